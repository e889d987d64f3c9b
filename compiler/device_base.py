"""What all operations of the `tbd` dialect share."""

from __future__ import annotations

from xdsl.dialects.builtin import IndexType, IntegerAttr, TensorType
from xdsl.ir import Block
from xdsl.irdl import IRDLOperation, ParsePropInAttrDict, opt_prop_def, prop_def, result_def, traits_def
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

FORMAT = "`(` operands `)` attr-dict `:` functional-type(operands, results)"
"""How most operations are written."""


def require_indices(block: Block, what: str) -> None:
    """Raise VerifyException unless a block's arguments are a token and a position, two indices."""
    if len(block.args) != 2 or not all(isinstance(a.type, IndexType) for a in block.args):
        raise VerifyException(f"{what} takes two index arguments, token and position")


class DeviceOp(IRDLOperation):
    """Any operation; properties are written in the attribute dictionary."""

    irdl_options = (ParsePropInAttrDict(),)


class Valued(DeviceOp):
    """An operation with one vector as its result; `at` and `scratch` are word addresses, set by `allocate`.

    Those with `rows_` or `next_` before them hold for the first or the second group of a block of a prompt's tokens
    (`typebar.compiler.rows`).
    """

    out = result_def(TensorType)
    at = opt_prop_def(IntegerAttr)
    scratch = opt_prop_def(IntegerAttr)
    rows_at = opt_prop_def(IntegerAttr)
    rows_scratch = opt_prop_def(IntegerAttr)
    next_at = opt_prop_def(IntegerAttr)
    next_scratch = opt_prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    @property
    def address(self) -> int:
        """The result's word address; only after `allocate`."""
        if self.at is None:
            raise VerifyException(f"{self.name} has no address: run the pass allocate first")
        return int(self.at.value.data)


class Sized(Valued):
    """An operation that computes `size` elements."""

    size = prop_def(IntegerAttr)

    @property
    def count(self) -> int:
        """Elements computed."""
        return int(self.size.value.data)
