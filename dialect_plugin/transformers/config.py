"""What ``quantization_config`` of a model of transformers holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..scheme import QUANT_METHOD, ActivationFormat, Scheme, SchemeError

__all__ = ["BlockDialectConfig"]

_WHERE = "quantization_config"
_Accumulation = Literal["default", "exact"]


class BlockDialectConfig(QuantizationConfigMixin):
    """How a model is quantized; an argument of ``from_pretrained``.

    With a 16-bit checkpoint, ``BlockDialectConfig(rotation="hadamard_32")`` quantizes it while
    loading, to the bytes of ``blockdialect quantize``. With a packed checkpoint, only
    ``activation_format`` and ``accumulation`` may be given; they apply to every layer.

    Args:
        accumulation: ``"default"`` or ``"exact"``, see :func:`dialect_kernels.dialect_linear`. Not
            saved.
        options: fields of :class:`~dialect_plugin.scheme.Scheme`.

    Attributes:
        quant_method: ``"blockdialect"``.
        scheme: the scheme; after loading it has exact layer names.
        accumulation: the argument.

    Raises:
        SchemeError: one sentence, if an option is not known or has a wrong value.
    """

    quant_method: ClassVar[str] = QUANT_METHOD

    def __init__(self, *, accumulation: _Accumulation = "default", **options: Any) -> None:
        if accumulation not in get_args(_Accumulation):
            raise SchemeError(
                f"{_WHERE}: accumulation is {accumulation!r}; allowed are 'default' and 'exact'"
            )
        self.scheme = Scheme.parse({"serialized": False, **options}, _WHERE)
        self.accumulation = accumulation
        self._chosen = {**options, "accumulation": accumulation}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the ``quantization_config`` of a config.json.

        Raises:
            SchemeError: one sentence, if it is not a valid scheme, or has no ``serialized``.
        """
        if "serialized" not in config_dict:
            raise SchemeError(
                f"{_WHERE}: serialized is missing; set it to true if the checkpoint is packed, or "
                "to false to quantize a 16-bit checkpoint while it loads"
            )
        made = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = made[0] if return_unused_kwargs else made
        config._chosen = {}  # some programs read config.json and give it back as an argument
        return made

    @property
    def activation_format(self) -> ActivationFormat:
        """Format of the activations of layers that no override names."""
        return self.scheme.activation_format

    @activation_format.setter
    def activation_format(self, value: ActivationFormat) -> None:
        """Give it to every layer; transformers calls this with :meth:`get_loading_attributes`."""
        self.scheme = self.scheme.with_activation_format(value)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of ``from_pretrained`` changes in the config of a packed checkpoint.

        Raises:
            SchemeError: if an option was given that the packed bytes have decided.
        """
        for key in self._chosen:
            if key not in {"activation_format", "accumulation"}:
                raise SchemeError(
                    f"{_WHERE}: {key} is given, but this checkpoint is packed already; only "
                    "activation_format and accumulation can be chosen now: leave the others out"
                )
        return self._chosen

    def to_dict(self) -> dict[str, Any]:
        """What is saved in config.json: the scheme, as the converter writes it."""
        return self.scheme.to_config()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """The items of :meth:`to_dict`."""
        yield from self.to_dict().items()
