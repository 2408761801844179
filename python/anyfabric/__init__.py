"""Move tensors point to point between the processes of an LLM system.

    import anyfabric as af

    with af.Engine() as engine:
        region = engine.register(tensor)
        engine.write(region[0:4096], remote[8192:12288], imm=7).wait()

Importing does nothing but define names: no thread, no environment, no log handler, no torch. Log lines
go to the logger `"anyfabric"`.
"""

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
]
