"""Python's side of tests/interop.rs: a scenario by name, the library tests/fixtures/python_host.rs, and what else it needs.

It says `passed` in the end; whatever is otherwise raises.
"""

import ctypes
import gc
import sys
import threading
import weakref

SCENARIO, HOST, *REST = sys.argv[1:]


def initialize(adopt=False, folder=None):
    """What went wrong, or None."""
    host = ctypes.CDLL(HOST)
    host.python_host_initialize.restype = ctypes.c_char_p
    host.python_host_initialize.argtypes = [ctypes.c_bool, ctypes.c_char_p]
    error = host.python_host_initialize(adopt, folder.encode() if folder else None)
    return error.decode() if error else None


def function(name):
    import tvm_ffi

    return tvm_ffi.get_global_func("flashinfer_rs.test." + name)


def adopt():
    import tvm_ffi

    error = initialize(adopt=True)
    assert error is None, error
    return tvm_ffi


def raised(function, *arguments):
    try:
        function(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def mapped():
    """The libtvm_ffi.so of this process, each once."""
    paths = {line.split()[-1] for line in open("/proc/self/maps") if "r-xp" in line}
    return sorted(path for path in paths if "libtvm_ffi.so" in path)


def values_and_functions(tvm_ffi):
    describe, echo = function("describe"), function("echo")
    assert describe(7) == "Int(7)" and describe(0.5) == "Float(0.5)" and describe(None) == "None"
    assert describe("short") == 'Str("short")' and describe("longer than that ☃") == 'Str("longer than that ☃")'
    assert describe(tvm_ffi.convert([1, "two", [3.0]])) == 'Array([Int(1), Str("two"), Array([Float(3.0)])])'
    assert describe(tvm_ffi.convert({"a": 1})) == 'Map({Str("a"): Int(1)})'
    assert describe(tvm_ffi.Shape((2, 3))) == "Shape(Shape[2, 3])"
    for value in [1 << 40, -1.5, "", "text", b"bytes", True, None]:
        assert echo(value) == value, value
    assert list(function("array")(100)) == list(range(100))
    assert dict(function("map")().items()) == {"a": 1, "b": "a text that is an object"}
    assert function("add")(1, 2) == 3.0

    # What goes wrong in Rust is an exception of its kind here.
    error = raised(function("add"), "one", 2)
    assert isinstance(error, TypeError) and "argument #0" in str(error) and "`add`" in str(error), error
    for kind in [ValueError, KeyError, IndexError, RuntimeError]:
        error = raised(function("fail"), kind.__name__, "what went wrong")
        assert type(error) is kind and "what went wrong" in str(error), repr(error)
    assert "panicked: on purpose" in str(raised(function("panic")))

    # And what goes wrong here is an error of its kind in Rust.
    call = function("call")
    assert call(lambda a, b: a + b, 35) == "Int(42)"
    assert call(lambda a, b: [a, str(b)], "x") == 'Array([Str("x"), Str("7")])'

    def fails(a, b):
        raise ValueError("on purpose")

    assert call(fails, 1) == "ValueError: on purpose (in interop.py)", call(fails, 1)
    # Through both, there and back.
    assert call(lambda a, b: call(lambda c, d: function("add")(c, d), a), 1) == 'Str("Float(8.0)")'


def references(tvm_ffi):
    array = tvm_ffi.convert(["a text that is an object"] * 3)
    count = function("references")
    before = count(array)
    handle = function("into_raw")(array)
    assert count(array) == before + 1
    again = function("from_raw")(handle)
    assert again.same_as(array) and count(array) == before + 1
    del again
    assert count(array) == before
    function("keep")(array)
    assert count(array) == before + 1
    assert function("forget")() == 1
    assert count(array) == before


def adopted():
    tvm_ffi = adopt()
    values_and_functions(tvm_ffi)
    references(tvm_ffi)
    assert len(mapped()) == 1, mapped()


def refused():
    import tvm_ffi

    for _ in range(2):
        error = initialize()
        assert error is not None and mapped()[0] in error and "adopt_tvm_ffi" in error, error
    # Nothing happened to what was there, and asking for it still works.
    assert list(tvm_ffi.convert([1, 2])) == [1, 2]
    assert initialize(adopt=True) is None
    values_and_functions(tvm_ffi)
    assert len(mapped()) == 1, mapped()


def ours_first():
    """With the very file that Python will load, it is one library, whoever comes first."""
    error = initialize(folder=REST[0])
    assert error is None, error
    import tvm_ffi

    values_and_functions(tvm_ffi)
    references(tvm_ffi)
    assert len(mapped()) == 1, mapped()


def another_file_second():
    error = initialize()
    assert error is None, error
    print("and now Python's", flush=True)
    import tvm_ffi

    print("came back", tvm_ffi.__version__)


# DLPack.

NAMES = {True: b"dltensor_versioned", False: b"dltensor"}
USED = {True: b"used_dltensor_versioned", False: b"used_dltensor"}
CAPSULE = ctypes.pythonapi
CAPSULE.PyCapsule_New.restype = ctypes.py_object
CAPSULE.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
CAPSULE.PyCapsule_GetPointer.restype = ctypes.c_void_p
CAPSULE.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
CAPSULE.PyCapsule_GetName.restype = ctypes.c_char_p
CAPSULE.PyCapsule_GetName.argtypes = [ctypes.py_object]
CAPSULE.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Lent:
    """A tensor of Rust's that asks for no package to be taken: by a capsule of the old or of the new kind."""

    def __init__(self, tensor, versioned):
        self.tensor, self.versioned = tensor, versioned

    def __dlpack__(self, **_):
        managed = function("to_dlpack")(self.tensor, self.versioned)
        return CAPSULE.PyCapsule_New(managed, NAMES[self.versioned], None)

    def __dlpack_device__(self):
        return (1, 0)


def take(capsule, versioned):
    """A tensor of Rust's over what a capsule holds."""
    name = CAPSULE.PyCapsule_GetName(capsule)
    assert name == NAMES[versioned], name
    managed = CAPSULE.PyCapsule_GetPointer(capsule, name)
    assert CAPSULE.PyCapsule_SetName(capsule, USED[versioned]) == 0
    return function("from_dlpack")(ctypes.c_void_p(managed), versioned)


class Owner:
    """What owns numbers that numpy shows, and tells when it goes."""

    def __init__(self, values, gone):
        """Calls `gone` then."""
        self.values = (ctypes.c_float * len(values))(*values)
        self.__array_interface__ = {
            "version": 3,
            "shape": (len(values),),
            "typestr": "<f4",
            "data": (ctypes.addressof(self.values), False),
        }
        weakref.finalize(self, gone)


def exchange(make, transposed, of_array, from_dlpack, to_list, kinds, new_capsule):
    """A package's tensors both ways: `make` makes one of a shape, `of_array` one over an array of numpy's; `kinds` are the
    capsules that it makes, `new_capsule` is whether it takes new ones."""
    import numpy

    drops = function("drops")

    # Out: values, then who lets go first.
    for versioned in [True, False] if new_capsule else [False]:
        start = drops()
        tensor = function("counted")(6)
        theirs = from_dlpack(Lent(tensor, versioned))
        assert to_list(theirs) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], theirs
        del tensor
        gc.collect()
        assert drops() == start and to_list(theirs)[5] == 5.0
        del theirs
        gc.collect()
        assert drops() == start + 1
        tensor = function("counted")(3)
        theirs = from_dlpack(Lent(tensor, versioned))
        del theirs
        gc.collect()
        assert drops() == start + 1 and function("sum")(tensor) == 3.0
        del tensor
        gc.collect()
        assert drops() == start + 2

    # In: plain, transposed, empty and of no dimension; then who lets go first.
    shapes = [(2, 3), (3, 2, 2), (0, 4), ()]
    for versioned, capsule in kinds:
        for shape in shapes:
            for source in [make(shape), transposed(make(shape))]:
                tensor = take(capsule(source), versioned)
                assert tuple(tensor.shape) == tuple(source.shape)
                twice = from_dlpack(function("twice")(tensor))
                assert to_list(twice) == to_list(source + source), (shape, twice)
        gone = threading.Event()
        source = of_array(numpy.asarray(Owner([1.0, 2.0], gone.set)))
        tensor = take(capsule(source), versioned)
        function("keep")(tensor)
        del source, tensor
        gc.collect()
        # Rust alone has it.
        assert not gone.is_set()
        assert function("forget")() == 1
        gc.collect()
        assert gone.is_set()
        # And on a thread that Python knows nothing of, which the package's deleter must cope with.
        gone = threading.Event()
        tensor = take(capsule(of_array(numpy.asarray(Owner([1.0, 2.0], gone.set)))), versioned)
        function("keep_tensor")(tensor)
        del tensor
        gc.collect()
        assert not gone.is_set()
        assert function("forget_elsewhere")() == 1
        assert gone.wait(60)
        source = make((4,))
        tensor = take(capsule(source), versioned)
        address = function("describe")(tensor)
        del tensor
        gc.collect()
        # It is the package's again, and was not copied.
        assert to_list(source) == to_list(make((4,))) and address.startswith("Tensor(")


def numpy():
    adopt()
    import numpy

    def make(shape):
        # Of no dimension it would be a number.
        return numpy.asarray(numpy.arange(int(numpy.prod(shape)), dtype=numpy.float32).reshape(shape) + numpy.float32(0.5))

    def flat(array):
        return numpy.asarray(array).ravel().tolist()

    kinds = [(True, lambda a: a.__dlpack__(max_version=(1, 0))), (False, lambda a: a.__dlpack__())]
    exchange(make, numpy.transpose, numpy.asarray, numpy.from_dlpack, flat, kinds, True)
    # By the package too, which makes objects of arrays by itself.
    assert function("sum")(make((2, 2))) == 8.0
    assert flat(numpy.from_dlpack(function("twice")(make((2, 2))))) == [1.0, 3.0, 5.0, 7.0]
    error = raised(function("sum"), make((2,)).astype(numpy.float64))
    assert isinstance(error, TypeError) and "F64" in str(error), error
    # Written through one, seen through the other.
    ours = function("counted")(3)
    theirs = numpy.from_dlpack(Lent(ours, True))
    theirs[1] = 40.0
    assert function("sum")(ours) == 42.0


def torch():
    import torch

    adopt()

    def make(shape):
        count = 1
        for size in shape:
            count *= size
        return torch.arange(count, dtype=torch.float32).reshape(shape) + 0.5

    def flat(tensor):
        return tensor.reshape(-1).tolist()

    # A release takes new capsules from when on it can make them.
    try:
        new = b"versioned" in CAPSULE.PyCapsule_GetName(make((1,)).__dlpack__(max_version=(1, 0)))
    except TypeError:
        new = False
    print("torch", torch.__version__, "with" if new else "without", "versioned capsules")
    kinds = [(False, torch.utils.dlpack.to_dlpack)]
    if new:
        kinds.append((True, lambda tensor: tensor.__dlpack__(max_version=(1, 0))))

    def transposed(tensor):
        return tensor.permute(tuple(reversed(range(tensor.dim()))))

    exchange(make, transposed, torch.from_numpy, torch.from_dlpack, flat, kinds, new)
    # By the package too, which makes objects of tensors by itself.
    assert function("sum")(make((2, 2))) == 8.0
    assert flat(torch.from_dlpack(function("twice")(make((2, 2))))) == [1.0, 3.0, 5.0, 7.0]


globals()[SCENARIO]()
print("passed")
