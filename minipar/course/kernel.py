"""The kernel that exercises are graded in: started while the grader loads, and missed at once when it dies."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import KernelManager
from jupyter_core.paths import jupyter_runtime_dir
from nbval.kernel import RunningKernel

from .tasks import CourseError


class KernelDied(Exception):
    """The kernel's process has ended."""


class CellFailed(CourseError):
    """The notebook's own set-up, or an answer of the solution, does not run. The message is its error."""


def by_file() -> dict[str, str]:
    """Settings of a kernel that is reached by files, not by ports: the manager finds ports that are free, and until the
    kernel listens there somebody else may, such as the ranks of a World that starts meanwhile."""
    if sys.platform == "win32":
        return {}
    folder = Path(jupyter_runtime_dir())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {"transport": "ipc", "ip": str(folder / f"kernel-{uuid4().hex[:12]}")}


class _ThisPython(KernelSpecManager):
    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        launch = "from minipar.course.launch import main; main()"
        argv = [sys.executable, "-c", launch, "-f", "{connection_file}", "--log-level=40"]
        return KernelSpec(argv=argv, display_name="minipar", language="python")


class Kernel(RunningKernel):
    """A kernel started in `folder`. Creating it does not wait; `ready()` does."""

    def __init__(self, folder: Path):
        self.km = KernelManager(kernel_name="minipar", kernel_spec_manager=_ThisPython(), **by_file())
        self.km.start_kernel(cwd=str(folder), stderr=subprocess.DEVNULL)
        self.folder = folder
        self.kc: Any = None
        self.reply: dict[str, Any] = {}
        self.spoiled = False  # something in it cannot be trusted any more

    def ready(self) -> None:
        """Wait until it answers. CellFailed where it does not within 60 s."""
        if self.kc is not None:
            return
        self.kc = self.km.client()
        self.kc.start_channels()
        for _ in range(100):
            msg_id = self.kc.kernel_info()
            try:
                self.await_reply(msg_id, timeout=60)
            except Empty:
                break
            with suppress(Empty):  # what a kernel publishes is lost until it knows who listens
                return self.await_idle(msg_id, timeout=0.1)
        raise CellFailed("the kernel does not answer")

    def get_message(self, stream: str, timeout: float | None = None) -> dict[str, Any]:
        """The next message. KernelDied, rather than a long wait, if there will be none."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            try:
                return super().get_message(stream, max(0, min(0.2, end - time.monotonic())))
            except Empty:
                if not self.is_alive():
                    self.spoiled = True
                    raise KernelDied from None
                if time.monotonic() >= end:
                    raise

    def await_reply(self, msg_id: str, timeout: float | None = None) -> None:
        """As nbval's, and keeps the reply: it tells of an exit() that takes effect only afterwards."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            message = self.get_message("shell", max(0, end - time.monotonic()))
            if message["parent_header"].get("msg_id") == msg_id:
                self.reply = message["content"]
                self.spoiled |= self.asked_to_exit
                return

    @property
    def asked_to_exit(self) -> bool:
        return any(p.get("source") == "ask_exit" for p in self.reply.get("payload", []))

    def interrupt(self) -> None:
        self.spoiled = True
        super().interrupt()

    def stop(self) -> None:
        self.spoiled = True
        if hasattr(self, "km"):  # nbval stops by itself a kernel that cannot be interrupted, or whose output is lost
            if self.kc is not None:
                self.kc.stop_channels()
            self.km.shutdown_kernel(now=True)
            del self.km

    def do(self, source: str) -> None:
        """Run code that must work. CellFailed if it does not, KernelDied if the kernel goes."""
        msg_id, self.reply = self.execute_cell_input(source, allow_stdin=False), {}
        try:
            self.await_reply(msg_id, timeout=60)
            self.await_idle(msg_id, timeout=5)
        except Empty:
            self.spoiled = True
            raise CellFailed("the kernel does not answer any more") from None
        if self.reply["status"] != "ok":
            error = f"{self.reply.get('ename')}: {self.reply.get('evalue')}"
            raise CellFailed(f"a cell that is not yours fails, so nothing can be graded: {error}")
