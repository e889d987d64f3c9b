"""What all operations of the `tbd` dialect share."""

from __future__ import annotations

from xdsl.dialects.builtin import IntegerAttr, TensorType
from xdsl.irdl import IRDLOperation, ParsePropInAttrDict, opt_prop_def, prop_def, result_def, traits_def
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

FORMAT = "`(` operands `)` attr-dict `:` functional-type(operands, results)"
"""How most operations are written."""


class DeviceOp(IRDLOperation):
    """Any operation; properties are written in the attribute dictionary."""

    irdl_options = (ParsePropInAttrDict(),)


class Valued(DeviceOp):
    """An operation with one vector as its result; `at` and `scratch` are word addresses, set by `allocate`."""

    out = result_def(TensorType)
    at = opt_prop_def(IntegerAttr)
    scratch = opt_prop_def(IntegerAttr)
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
