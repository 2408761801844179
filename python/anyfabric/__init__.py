"""Move tensors point to point between the processes of an LLM system.

Two engines, here in one process; a descriptor and an imm travel however you like:

>>> import numpy as np
>>> import anyfabric as af
>>> with af.Engine() as sender, af.Engine() as receiver:
...     region = receiver.allocate(4096)
...     counter = receiver.counter()
...     remote = af.Descriptor.from_bytes(region.descriptor().to_bytes())
...
...     tensor = np.arange(1024, dtype="float32")
...     transfer = sender.write(sender.register(tensor), remote, imm=counter.imm)
...
...     counter.wait(1, timeout_s=5)
...     print(region.numpy("float32")[-1])
1023.0

Importing does nothing but define names: no thread, no environment, no log handler, no torch. Log lines
go to the logger `"anyfabric"`.
"""

# The hooks make the errors: they must be there before the first one, which may be that no file can be opened.
from anyfabric import _hooks as _hooks
from anyfabric._core import (
    Address,
    Counter,
    Descriptor,
    Message,
    PeerGroup,
    Region,
    RemoteSlice,
    Slice,
    Transfer,
    Watcher,
    __version__,
)
from anyfabric.engine import Engine
from anyfabric.errors import (
    AnyFabricError,
    Cancelled,
    Closed,
    ConnectionBroken,
    DeviceLost,
    EngineForked,
    Internal,
    InvalidArgument,
    PeerLost,
    QueueFull,
    Refused,
    ResourceExhausted,
    TransferFailed,
    TransferTimeout,
    Unsupported,
    WaitTimeout,
)
from anyfabric.pages import Pages, Target, Write, WritePages
from anyfabric.path import Path
from anyfabric.topology import Topology, read_topology
from anyfabric.watcher import Trigger

__all__ = [
    "Address",
    "AnyFabricError",
    "Cancelled",
    "Closed",
    "ConnectionBroken",
    "Counter",
    "Descriptor",
    "DeviceLost",
    "Engine",
    "EngineForked",
    "Internal",
    "InvalidArgument",
    "Message",
    "Pages",
    "Path",
    "PeerGroup",
    "PeerLost",
    "QueueFull",
    "Refused",
    "Region",
    "RemoteSlice",
    "ResourceExhausted",
    "Slice",
    "Target",
    "Topology",
    "Transfer",
    "TransferFailed",
    "TransferTimeout",
    "Trigger",
    "Unsupported",
    "WaitTimeout",
    "Watcher",
    "Write",
    "WritePages",
    "__version__",
    "read_topology",
]
