"""Stand-ins for the driver's library: C functions as methods, called by the real pynvml binding."""

import ctypes
import time

GIB = 1 << 30
TOTAL, RESERVED = 80 * GIB, GIB // 2
FIRST, SECOND = "GPU-11111111-aaaa", "GPU-22222222-bbbb"
SECOND_BUS = "00000000:41:00.0"
NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, LIBRARY_NOT_FOUND, GPU_IS_LOST = 3, 4, 6, 12, 15
USED = (11 * GIB, 22 * GIB)
"""Bytes in use on the two devices, the driver's reserve left out."""


class OldLibrary:
    """Two devices and memory v1 only, as under WSL: there `used` contains the driver's reserve."""

    def nvmlInitWithFlags(self, flags):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        return self._hand_out([FIRST, SECOND], uuid, handle)

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id, handle):
        return self._hand_out(["00000000:01:00.0", SECOND_BUS], bus_id, handle)

    def nvmlDeviceGetMemoryInfo(self, handle, reference):
        memory = reference._obj
        memory.total, memory.used = TOTAL, self.used(_number(handle)) + RESERVED
        memory.free = memory.total - memory.used
        return 0

    def used(self, device):
        return USED[device]

    def _hand_out(self, names, name, handle):
        if name.value.decode() not in names:
            return NOT_FOUND
        pointer = ctypes.c_void_p.from_buffer(handle._obj)
        pointer.value = 1 + names.index(name.value.decode())
        return 0


def _number(handle):
    return ctypes.cast(handle, ctypes.c_void_p).value - 1


class Library(OldLibrary):
    """With memory v2, whose `used` leaves the reserve out."""

    def nvmlDeviceGetMemoryInfo_v2(self, handle, reference):
        memory = reference._obj
        used = self.used(_number(handle))
        memory.total, memory.reserved, memory.used = TOTAL, RESERVED, self.reported(used)
        memory.free = TOTAL - RESERVED - used
        return 0

    def reported(self, used):
        return used


class Inclusive(Library):
    """Memory v2 whose `used` contains the reserve."""

    def reported(self, used):
        return used + RESERVED


class Nonsense(Library):
    """Memory v2 that does not add up."""

    def reported(self, used):
        return used + 7


class Refusing(OldLibrary):
    """Memory queries return a code, from the n-th on."""

    def __init__(self, code, after=0):
        self.code, self.left = code, after

    def nvmlDeviceGetMemoryInfo(self, handle, reference):
        self.left -= 1
        return self.code if self.left < 0 else super().nvmlDeviceGetMemoryInfo(handle, reference)


class Unloadable:
    """Initialisation fails."""

    def __init__(self, code):
        self.code = code

    def nvmlInitWithFlags(self, flags):
        return self.code


class Rising(Library):
    """A sixteenth of a GiB more at each reading."""

    def __init__(self):
        self.readings = 0

    def used(self, device):
        self.readings += 1
        return self.readings * GIB // 16


class Hanging(Library):
    """A driver that stops answering once sampling has begun."""

    def __init__(self):
        self.readings = 0

    def used(self, device):
        self.readings += 1
        if self.readings > 8:
            time.sleep(60)
        return USED[device]


normal = Library()
absent = Unloadable(LIBRARY_NOT_FOUND)
rising = Rising()
hanging = Hanging()
lost_later = Refusing(GPU_IS_LOST, after=10)
