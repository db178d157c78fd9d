"""Stand-ins for the driver's libraries: C functions as methods; the real pynvml binding calls those
of NVML.
"""

import ctypes
import os
import time
import uuid

GIB = 1 << 30
TOTAL, RESERVED = 80 * GIB, GIB // 2
FIRST = "GPU-11111111-aaaa-bbbb-cccc-000000000001"
SECOND = "GPU-22222222-aaaa-bbbb-cccc-000000000002"
SLICE = "MIG-33333333-aaaa-bbbb-cccc-000000000003"
SECOND_BUS = "00000000:41:00.0"
NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, LIBRARY_NOT_FOUND, GPU_IS_LOST = 3, 4, 6, 12, 15
INSUFFICIENT_SIZE, NO_VALUE = 7, (1 << 64) - 1
USED = (11 * GIB, 22 * GIB, 5 * GIB)
"""Bytes in use on the two devices and the slice of a third, the driver's reserve left out."""


class OldLibrary:
    """Two devices and memory v1 only, as under WSL: there `used` contains the driver's reserve."""

    def nvmlInitWithFlags(self, flags):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        return self._hand_out([FIRST, SECOND, SLICE], uuid, handle)

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


class Telling(Library):
    """With everything else a device tells, too."""

    def __init__(self):
        self.begun_s = None
        self.pids = {}
        """pid -> bytes; None: NVML has no figure for it."""
        self.reasons = 0
        self.throttled_ns = {74: 0, 75: 0, 76: 0, 77: 0, 79: 0}
        self.refused_fields = ()

    def nvmlDeviceGetClockInfo(self, handle, kind, reference):
        reference._obj.value = {1: 1980, 2: 3201}[kind.value]
        return 0

    def nvmlDeviceGetTemperature(self, handle, sensor, reference):
        reference._obj.value = 41
        return 0

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle, reference):
        reference._obj.value = self.reasons
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, reference):
        """400 W, told every 20 ms."""
        self.begun_s = self.begun_s or time.monotonic()
        reference._obj.value = 1000 + 8000 * int((time.monotonic() - self.begun_s) / 0.02)
        return 0

    def nvmlDeviceGetFieldValues(self, handle, count, reference):
        for field in reference._obj:
            field.nvmlReturn = NOT_SUPPORTED if field.fieldId in self.refused_fields else 0
            field.valueType = 3
            field.value.ullVal = self.throttled_ns.get(field.fieldId, 0)
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, array):
        pids = self.pids or {os.getppid(): USED[_number(handle)]}
        count._obj.value = len(pids)
        if array is None:
            return INSUFFICIENT_SIZE
        for one, (pid, held) in zip(array, pids.items(), strict=False):
            one.pid, one.usedGpuMemory = pid, NO_VALUE if held is None else held
        return 0

    def nvmlSystemGetProcessName(self, pid, buffer, length):
        buffer.value = b"/usr/bin/python3"
        return 0


class OlderDriver(Telling):
    """Knows the clocks' reasons by their former name only."""

    nvmlDeviceGetCurrentClocksEventReasons = property()

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, reference):
        reference._obj.value = self.reasons
        return 0


class Cuda:
    """CUDA's driver: the visible devices in CUDA's own order."""

    def __init__(self, *names):
        self.names = names

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, reference, ordinal):
        if ordinal >= len(self.names):
            return 101
        reference._obj.value = ordinal
        return 0

    def cuDeviceGetUuid_v2(self, reference, device):
        raw = uuid.UUID(self.names[device.value][4:]).bytes
        ctypes.memmove(ctypes.addressof(reference._obj), raw, 16)
        return 0


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
telling = Telling()
cuda, cuda_reversed = Cuda(SECOND, FIRST), Cuda(FIRST, SECOND)
cuda_slice = Cuda("GPU-" + SLICE[4:])
absent = Unloadable(LIBRARY_NOT_FOUND)
rising = Rising()
hanging = Hanging()
lost_later = Refusing(GPU_IS_LOST, after=10)
