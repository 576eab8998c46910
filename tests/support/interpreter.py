"""Takes out of Triton's interpreter what makes it slow, for the tests.

It goes by parts that are private to Triton: each replacement is made only where what it replaces is as known, and does
the same.
"""

import dataclasses
import os

import numpy as np


def quicken(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    core = language.core
    is_builtin = getattr(core, "is_builtin", lambda member: False)
    if hasattr(interpreter, "_patch_lang") and is_builtin(language.load):
        _patch_once(monkeypatch, interpreter, language, is_builtin)
    if hasattr(interpreter, "ReduceOps") and hasattr(language.standard, "_xor_combine"):
        _reduce_quickly(monkeypatch, interpreter.ReduceOps, language.standard._xor_combine)
    if hasattr(interpreter.interpreter_builder.options, "sanitize_overflow"):
        _overlook_overflow(monkeypatch, interpreter.interpreter_builder)
    if hasattr(interpreter, "_get_np_dtype"):
        _remember_dtypes(monkeypatch, interpreter, core)
    if isinstance(getattr(core.block_type(core.int1, [4]), "shape", None), core.tuple):
        _remember_block_types(monkeypatch, core)
        _share_shapes(monkeypatch, core)
        _broadcast_quickly(monkeypatch, interpreter.interpreter_semantic)
        _match_quickly(monkeypatch, interpreter.interpreter_semantic, core)


def _patch_once(monkeypatch, interpreter, language, is_builtin):
    """The interpreter patches triton.language at the kernel and anew at each call of a helper inside it: half of all
    its time."""
    patch = interpreter._patch_lang

    def patch_once(function):
        modules = [value for value in function.__globals__.values() if value is language or value is language.core]
        return patch(function) if any(is_builtin(module.load) for module in modules) else None

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


def _reduce_quickly(monkeypatch, reductions, xor):
    """Reductions inside a sort are done element by element."""
    reduce = reductions.apply_impl

    def reduce_quickly(self, values):
        if self.combine_fn is not xor:
            return reduce(self, values)
        result = np.bitwise_xor.reduce(values[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(result, values[0].dtype)

    monkeypatch.setattr(reductions, "apply_impl", reduce_quickly)


def _remember_dtypes(monkeypatch, interpreter, core):
    """NumPy's type of each of Triton's is looked up in a table that is built for every look."""
    look_up, known = interpreter._get_np_dtype, {}

    def remember(dtype):
        element = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        if isinstance(element, core.pointer_type):
            return look_up(element)
        if element.name not in known:
            known[element.name] = look_up(element)
        return known[element.name]

    monkeypatch.setattr(interpreter, "_get_np_dtype", remember)


def _remember_block_types(monkeypatch, core):
    """A block's type is checked, and its name written, once for each element and shape."""
    create, known = core.block_type.__init__, {}

    def remember(self, element_ty, shape):
        key = (element_ty.name, *map(core._unwrap_if_constexpr, shape))
        if key in known:
            self.__dict__.update(known[key])
        else:
            create(self, element_ty, shape)
            known[key] = dict(self.__dict__)

    monkeypatch.setattr(core.block_type, "__init__", remember)


def _share_shapes(monkeypatch, core):
    """Tensors of one shape have it, and its product, in common."""
    create, known = core.tensor.__init__, {}

    def share(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = known[key]
        else:
            create(self, handle, type)
            known[key] = self.numel, self.shape

    monkeypatch.setattr(core.tensor, "__init__", share)


def _broadcast_quickly(monkeypatch, semantic):
    """Two blocks of one shape are as they should be."""
    broadcast = semantic.broadcast_impl_value

    def broadcast_quickly(lhs, rhs):
        if lhs.shape is rhs.shape:  # as _share_shapes has them
            return lhs, rhs
        return broadcast(lhs, rhs)

    monkeypatch.setattr(semantic, "broadcast_impl_value", broadcast_quickly)


def _match_quickly(monkeypatch, semantic, core):
    """Operands of one ordinary type keep it, and a number takes the type of what is beside it."""
    match, cast = semantic.binary_op_type_checking_impl, semantic.cast
    floats = {id(each) for each in (core.float32, core.float64)}
    integers = {id(each) for each in (core.int1, core.int32, core.int64)}
    ordinary = floats | integers

    def fits(number, dtype, flags):
        if id(dtype) in floats:
            return type(number) in (int, float)
        return dtype is core.int32 and type(number) is int and -(2**31) <= number < 2**31 and len(flags) < 3

    def match_quickly(lhs, rhs, *flags):
        if type(lhs) is core.tensor:
            if type(rhs) is core.tensor:
                one_type = lhs.dtype is rhs.dtype and id(rhs.dtype) in ordinary
                if one_type or (lhs.dtype.is_ptr() and id(rhs.dtype) in integers and flags == (True, True)):
                    return semantic.broadcast_impl_value(lhs, rhs)
            elif fits(rhs, lhs.dtype, flags):
                return semantic.broadcast_impl_value(lhs, semantic.scalar_constant(rhs, lhs.dtype))
        elif type(rhs) is core.tensor and fits(lhs, rhs.dtype, flags):
            return semantic.broadcast_impl_value(semantic.scalar_constant(lhs, rhs.dtype), rhs)
        return match(lhs, rhs, *flags)

    def cast_quickly(value, dtype, *rounding):
        return value if value.dtype is dtype.scalar else cast(value, dtype, *rounding)

    monkeypatch.setattr(semantic, "binary_op_type_checking_impl", match_quickly)
    monkeypatch.setattr(semantic, "cast", cast_quickly)


def _overlook_overflow(monkeypatch, builder):
    """Integers are computed a second time, to assert that they do not overflow; but without `debug` no assertion is
    executed."""
    if not builder.options.debug:
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
