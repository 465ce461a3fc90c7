"""Our parameters under the names of Hugging Face's Llama, and back: pure functions, no files.

`huggingface.py` puts them into folders. The mapping, with E the embedding, w the scale of the last norm, and
dimensions as in `model.py`:

    embed_tokens = sqrt(D) E      norm = w              lm_head = head.T      untied
    embed_tokens = sqrt(D) E      norm = w / sqrt(D)    lm_head = sqrt(D) E   tied: it is embed_tokens
    every kernel: its contracted axes flattened to [inputs, outputs], then transposed
    every other norm: as it is

Rotary positions need no permutation: both rotate the pairs (i, i + H/2).
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping

import numpy as np
from flax import traverse_util

from model import MATRICES, NORM_EPSILON, ModelConfig

SCALED = ("model.embed_tokens.weight", "model.norm.weight")  # these hold products of our parameters


class _Leaf(typing.NamedTuple):
    """One parameter: its names and shape here, and how many leading axes are contracted (0: it is no matrix)."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    inputs: int

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Llama stores a matrix as [outputs, inputs]."""
        split = self.inputs
        return (math.prod(self.shape[split:]), math.prod(self.shape[:split])) if split else self.shape


def _leaves(c: ModelConfig) -> Iterator[_Leaf]:
    """All parameters of a decoder."""
    D, N, K, H, F, V = c.width, c.heads, c.kv_heads, c.head_width, c.mlp_width, c.vocab_size
    yield _Leaf("embedding", "model.embed_tokens.weight", (V, D), 0)
    for layer in range(c.layers):
        block = f"model.layers.{layer}"
        yield _Leaf(f"attention_norm_{layer}/scale", f"{block}.input_layernorm.weight", (D,), 0)
        yield _Leaf(f"mlp_norm_{layer}/scale", f"{block}.post_attention_layernorm.weight", (D,), 0)
        kernels: dict[str, tuple[int, ...]] = {"query": (D, N, H), "key": (D, K, H), "value": (D, K, H)}
        for name, shape in (kernels | {"out": (N, H, D)}).items():
            theirs = f"{block}.self_attn.{name[0]}_proj.weight"
            yield _Leaf(f"attention_{layer}/{name}", theirs, shape, MATRICES[name])
        for name, shape in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items():
            yield _Leaf(f"mlp_{layer}/{name}", f"{block}.mlp.{name}_proj.weight", shape, MATRICES[name])
    yield _Leaf("final_norm/scale", "model.norm.weight", (D,), 0)
    if not c.tied:
        yield _Leaf("head", "lm_head.weight", (D, V), 1)


def _factors(config: ModelConfig) -> dict[str, float]:
    """What the export multiplies a parameter by, where that is not 1."""
    root = math.sqrt(config.width)
    return {"embedding": root, "final_norm/scale": 1 / root if config.tied else 1.0}


def to_llama(params: typing.Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters as float32 arrays named and shaped as transformers' LlamaForCausalLM has them.

    Raises ValueError on other names or shapes.
    """
    flat, factors = traverse_util.flatten_dict(params, sep="/"), _factors(config)
    leaves = list(_leaves(config))
    fit({name: np.shape(array) for name, array in flat.items()}, {leaf.ours: leaf.shape for leaf in leaves})
    tensors = {}
    for leaf in leaves:
        array = (np.asarray(flat[leaf.ours], np.float64) * factors.get(leaf.ours, 1)).astype(np.float32)
        tensors[leaf.theirs] = np.ascontiguousarray(array.reshape(leaf.their_shape[::-1]).T if leaf.inputs else array)
    return tensors


def from_llama(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, typing.Any]:
    """The inverse of `to_llama`: a tree of float32 arrays. Raises ValueError on other names or shapes."""
    flat, factors, leaves = {}, _factors(config), list(_leaves(config))
    fit({name: array.shape for name, array in tensors.items()}, {leaf.theirs: leaf.their_shape for leaf in leaves})
    for leaf in leaves:
        array = tensors[leaf.theirs].T.reshape(leaf.shape) if leaf.inputs else tensors[leaf.theirs]
        flat[leaf.ours] = (array.astype(np.float64) / factors.get(leaf.ours, 1)).astype(np.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def fit(found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    """Raises ValueError, with the first three differences, unless names and shapes are those wanted."""
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is left over" for name in found.keys() - wanted.keys()]
    both = wanted.keys() & found.keys()
    wrong += [f"{n} is {list(found[n])}, not {list(wanted[n])}" for n in both if found[n] != wanted[n]]
    if wrong:
        raise ValueError("; ".join(sorted(wrong)[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


_FIELDS = {  # ModelConfig -> config.json. transformers computes in the dtype that ours does, whatever the arrays have
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "context": "max_position_embeddings",
    "rope_theta": "rope_theta",  # read by transformers 4
    "tied": "tie_word_embeddings",
    "dtype": "torch_dtype",
}


def llama_config(config: ModelConfig, end_id: int = 1) -> dict[str, typing.Any]:
    """config.json of a decoder."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # read by transformers 5
        "rms_norm_eps": NORM_EPSILON,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": end_id,
    }


def model_config(hf_config: Mapping[str, typing.Any]) -> ModelConfig:
    """The decoder that a config.json of ours describes."""
    return ModelConfig(**{ours: hf_config[theirs] for ours, theirs in _FIELDS.items()})
