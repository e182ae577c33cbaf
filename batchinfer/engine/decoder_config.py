"""What the lean decoder has to know of a model, and which models it can be sure to compute exactly.

The facts come from transformers' configuration objects, which fill in each family's own defaults; what they mean
is read from that family's modeling file. A model is supported only where every feature its configuration turns on
is one the decoder has: anything else is refused with the reason, never approximated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from batchinfer.errors import ModelError

__all__ = ["DecoderConfig", "LayerNames", "Llama3Scaling", "Rotary", "decoder_config", "supported"]

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ATTENTIONS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """The numbers of Llama 3's rope scaling, named as in ``rope_parameters``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embedding of the first ``dim`` columns of a head."""

    dim: int
    theta: float
    scaling: Llama3Scaling | None


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Tensors of a layer, after ``model.layers.N.``, as transformers names them; None where the family has none.

    Two norms may surround attention and two the MLP: before, on its input, and after, on its output.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Facts of one model. Soft caps and windows of 0 mean none; ``windows`` and ``rotates`` have one entry per layer.

    ``norm_unit_offset`` is added to norm weights; ``embedding_scale`` multiplies embeddings and ``score_scale``
    attention scores.
    """

    family: str
    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    activation: str
    rotary: Rotary
    windows: tuple[int, ...]
    rotates: tuple[bool, ...]
    names: LayerNames
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    score_scale: float
    embedding_scale: float = 1.0
    norm_unit_offset: float = 0.0
    score_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0

    @property
    def qkv_size(self) -> int:
        """Columns of the fused projection: query heads, key heads, value heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def supported(config: PreTrainedConfig) -> str | None:
    """Why the decoder cannot run this model, or None where it can."""
    try:
        decoder_config(config)
    except ModelError as error:
        return str(error)
    return None


def decoder_config(config: PreTrainedConfig) -> DecoderConfig:
    """The facts of a model. EXAONE 3.x comes as the ``LlamaConfig`` it is.

    Raises ModelError, naming the feature, for a model that the decoder would not compute exactly.
    """
    family = str(config.model_type)
    if family not in _FAMILIES:
        raise ModelError(f"model type {family}: the continuous engine knows {', '.join(sorted(_FAMILIES))}")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"model type {family}: quantised weights are not supported by the continuous engine")
    return _FAMILIES[family](_Values(config, family))


class _Values:
    """Checked access to a configuration's fields."""

    def __init__(self, config: PreTrainedConfig, family: str) -> None:
        self._config = config
        self.family = family

    def size(self, name: str) -> int:
        value = getattr(self._config, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.unsupported(f"{name} {value!r} is not a whole number above 0")
        return value

    def size_or(self, name: str, default: int) -> int:
        return default if getattr(self._config, name, None) is None else self.size(name)

    def number(self, name: str) -> float:
        value = getattr(self._config, name, None)
        if not isinstance(value, int | float):
            raise self.unsupported(f"{name} {value!r} is not a number")
        return float(value)

    def cap(self, name: str) -> float:
        return 0.0 if getattr(self._config, name, None) is None else self.number(name)

    def flag(self, name: str) -> bool:
        return bool(getattr(self._config, name, False))

    def text(self, name: str) -> str:
        return str(getattr(self._config, name, None))

    def windows(self) -> tuple[int, ...]:
        """By ``layer_types``, or in every layer where the family has none."""
        num_layers = self.size("num_hidden_layers")
        window = self.size_or("sliding_window", 0)
        types = getattr(self._config, "layer_types", None)
        if types is None:
            return (window,) * num_layers
        foreign = sorted({str(name) for name in types} - set(_ATTENTIONS))
        if foreign:
            raise self.unsupported(f"layers of type {', '.join(foreign)}")
        if len(types) != num_layers:
            raise self.unsupported(f"{len(types)} layer_types for {num_layers} layers")
        if not window and "sliding_attention" in types:
            raise self.unsupported("sliding layers without a sliding_window")
        return tuple(window if name == "sliding_attention" else 0 for name in types)

    def rotary(self, head_dim: int) -> Rotary:
        rope = getattr(self._config, "rope_parameters", None)
        if not isinstance(rope, Mapping) or "rope_theta" not in rope:
            raise self.unsupported(f"rope_parameters {rope!r}")
        kind = rope.get("rope_type", "default")
        if kind not in ("default", "llama3"):
            raise self.unsupported(f"rope type {kind}")
        partial = float(rope.get("partial_rotary_factor", 1.0))
        if partial != 1.0 and (self.family != "phi3" or kind != "default"):
            raise self.unsupported(f"partial_rotary_factor {partial}")
        scaling = None
        if kind == "llama3":
            try:
                scaling = Llama3Scaling(
                    factor=float(rope["factor"]),
                    low_freq_factor=float(rope["low_freq_factor"]),
                    high_freq_factor=float(rope["high_freq_factor"]),
                    original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise self.unsupported(f"rope_parameters {dict(rope)!r}") from error
        dim = int(head_dim * partial)
        if dim % 2 or not 0 < dim <= head_dim:
            raise self.unsupported(f"a rotary embedding of {dim} columns of {head_dim}")
        return Rotary(dim, float(rope["rope_theta"]), scaling)

    def unsupported(self, feature: str) -> ModelError:
        return ModelError(f"model type {self.family}: the continuous engine does not support {feature}")


def _common(
    values: _Values,
    *,
    names: LayerNames | None = None,
    windows: tuple[int, ...] | None = None,
    rotates: tuple[bool, ...] | None = None,
    activation: str = "hidden_act",
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    score_scale: float | None = None,
    embedding_scale: float = 1.0,
    norm_unit_offset: float = 0.0,
    score_soft_cap: float = 0.0,
    logit_soft_cap: float = 0.0,
) -> DecoderConfig:
    """What all families share; left out are a full view and rotation in every layer and no extras."""
    num_layers, num_heads = values.size("num_hidden_layers"), values.size("num_attention_heads")
    num_kv_heads = values.size_or("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise values.unsupported(f"{num_heads} attention heads over {num_kv_heads} key/value heads")
    head_dim = values.size_or("head_dim", values.size("hidden_size") // num_heads)
    if values.text(activation) not in _ACTIVATIONS:
        raise values.unsupported(f"activation {values.text(activation)}")
    return DecoderConfig(
        family=values.family,
        vocab_size=values.size("vocab_size"),
        hidden_size=values.size("hidden_size"),
        inner_size=values.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=values.number("rms_norm_eps"),
        activation=_ACTIVATIONS[values.text(activation)],
        rotary=values.rotary(head_dim),
        windows=windows or (0,) * num_layers,
        rotates=rotates or (True,) * num_layers,
        names=names or LayerNames(),
        tied=values.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        score_scale=head_dim**-0.5 if score_scale is None else score_scale,
        embedding_scale=embedding_scale,
        norm_unit_offset=norm_unit_offset,
        score_soft_cap=score_soft_cap,
        logit_soft_cap=logit_soft_cap,
    )


def _llama(values: _Values) -> DecoderConfig:
    bias = values.flag("attention_bias")
    return _common(values, qkv_bias=bias, out_bias=bias, mlp_bias=values.flag("mlp_bias"))


def _mistral(values: _Values) -> DecoderConfig:
    return _common(values, windows=values.windows())


def _qwen2(values: _Values) -> DecoderConfig:
    return _common(values, windows=values.windows(), qkv_bias=True)


def _qwen3(values: _Values) -> DecoderConfig:
    bias = values.flag("attention_bias")
    return _common(values, windows=values.windows(), qkv_bias=bias, out_bias=bias, qk_norm=True)


def _phi3(values: _Values) -> DecoderConfig:
    names = LayerNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
    return _common(values, names=names, windows=values.windows())


def _exaone4(values: _Values) -> DecoderConfig:
    """Norms on the outputs alone; a hybrid model rotates in its sliding layers only."""
    names = LayerNames(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    )
    windows = values.windows()
    hybrid = values.size_or("sliding_window", 0) > 0
    rotates = tuple(window > 0 or not hybrid for window in windows)
    return _common(values, names=names, windows=windows, rotates=rotates, qk_norm=True)


def _gemma2(values: _Values) -> DecoderConfig:
    if values.flag("use_bidirectional_attention"):
        raise values.unsupported("bidirectional attention")
    names = LayerNames(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    )
    bias = values.flag("attention_bias")
    return _common(
        values,
        names=names,
        windows=values.windows(),
        activation="hidden_activation",
        qkv_bias=bias,
        out_bias=bias,
        score_scale=values.number("query_pre_attn_scalar") ** -0.5,
        embedding_scale=values.number("hidden_size") ** 0.5,
        norm_unit_offset=1.0,
        score_soft_cap=values.cap("attn_logit_softcapping"),
        logit_soft_cap=values.cap("final_logit_softcapping"),
    )


_FAMILIES = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "exaone4": _exaone4,
    "gemma2": _gemma2,
}
