"""A device plugin that gives its node `nvidia.com/gpu` devices without hardware behind them.

usage: plugin.py COUNT UNHEALTHY_FILE

The kubelet counts, allocates and takes away as with real cards. Devices named in the file (gpu0, gpu1, ...; one a line)
are reported Unhealthy within a second. Runs with a Python that has grpcio and, on its path, the modules generated from
deviceplugin.proto.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# the first two are generated beside the Python that runs this, in the cache
import deviceplugin_pb2 as messages  # type: ignore[import-not-found]
import deviceplugin_pb2_grpc as services  # type: ignore[import-not-found]
import grpc  # type: ignore[import-untyped]

RESOURCE = "nvidia.com/gpu"
FOLDER = Path("/var/lib/kubelet/device-plugins")
KUBELET = FOLDER / "kubelet.sock"
SOCKET = FOLDER / "simulated-gpu.sock"


class Plugin(services.DevicePluginServicer):  # type: ignore[misc]
    def __init__(self, count: int, unhealthy_file: Path) -> None:
        self.count = count
        self.unhealthy_file = unhealthy_file

    def devices(self) -> list[tuple[str, str]]:
        """(id, health) of every device, as the file says now."""
        bad = set(self.unhealthy_file.read_text().split()) if self.unhealthy_file.exists() else set()
        names = [f"gpu{number}" for number in range(self.count)]
        return [(name, "Unhealthy" if name in bad else "Healthy") for name in names]

    def GetDevicePluginOptions(self, request: Any, context: Any) -> Any:
        return messages.DevicePluginOptions()

    def ListAndWatch(self, request: Any, context: grpc.ServicerContext) -> Iterator[messages.ListAndWatchResponse]:
        told = None
        while context.is_active():
            if (devices := self.devices()) != told:
                told = devices
                listed = [messages.Device(ID=name, health=health) for name, health in devices]
                yield messages.ListAndWatchResponse(devices=listed)
            time.sleep(0.5)

    def Allocate(self, request: Any, context: Any) -> Any:
        print("allocate", [list(wanted.devices_ids) for wanted in request.container_requests], flush=True)
        # "void" tells a real NVIDIA runtime to keep out; the devices' names say what was allocated
        return messages.AllocateResponse(
            container_responses=[
                messages.ContainerAllocateResponse(
                    envs={"NVIDIA_VISIBLE_DEVICES": "void", "SIMULATED_GPUS": ",".join(wanted.devices_ids)}
                )
                for wanted in request.container_requests
            ]
        )


def serve(plugin: Plugin) -> None:
    """Serves the plugin, makes it known to the kubelet and returns once that kubelet was restarted."""
    while not KUBELET.exists():
        time.sleep(0.2)
    kubelet = KUBELET.stat().st_ino
    SOCKET.unlink(missing_ok=True)
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    services.add_DevicePluginServicer_to_server(plugin, server)
    server.add_insecure_port(f"unix://{SOCKET}")
    server.start()
    # without an authority of its own grpc sends the socket's path, which Go's server refuses
    with grpc.insecure_channel(f"unix://{KUBELET}", options=[("grpc.default_authority", "localhost")]) as channel:
        services.RegistrationStub(channel).Register(
            messages.RegisterRequest(version="v1beta1", endpoint=SOCKET.name, resource_name=RESOURCE), timeout=10
        )
    print(f"registered {plugin.count} x {RESOURCE}", flush=True)
    while KUBELET.exists() and KUBELET.stat().st_ino == kubelet and SOCKET.exists():
        time.sleep(0.5)


def main() -> None:
    plugin = Plugin(int(sys.argv[1]), Path(sys.argv[2]))
    try:
        serve(plugin)
    except (grpc.RpcError, OSError) as error:  # the kubelet is not ready yet
        print(error, flush=True)
        time.sleep(1)
    # a kubelet that restarts forgets its plugins: begin anew, with fresh grpc state
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    main()
