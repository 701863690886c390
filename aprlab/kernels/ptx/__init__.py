"""A machine that runs PTX on the CPU, with NumPy alone: values bit for bit, mistakes, memory traffic, step by step.

>>> module = parse(text)
>>> report = Machine(module).launch("kernel", grid, block, [weights, x, out, rows], checks=True)
"""

from aprlab.kernels.ptx.checks import KernelFinding
from aprlab.kernels.ptx.counters import Counters, LineProfile, Traffic
from aprlab.kernels.ptx.machine import KernelFault, LaunchReport, Machine
from aprlab.kernels.ptx.memory import Pointer
from aprlab.kernels.ptx.parser import Module, parse
from aprlab.kernels.ptx.stepper import Stepper, WarpView

__all__ = [
    "Counters",
    "KernelFault",
    "KernelFinding",
    "LaunchReport",
    "LineProfile",
    "Machine",
    "Module",
    "Pointer",
    "Stepper",
    "Traffic",
    "WarpView",
    "parse",
]
