"""One worker in one container: what it sees of this machine, how it ended, that it is gone."""

import os
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import records
from bench.launching.engines import Engine, full_digest
from bench.machine import VARIABLES, UnfitMachine

REPOSITORY = Path(__file__).resolve().parents[2]
LABEL = "ilora-bench.run"
"""Label of every container: the folder of the run that started it."""
REMOVAL_S = 60.0
OF_THE_HOST = (
    "BNB_CUDA_VERSION",
    "CUDA_BIN_PATH",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_ROOT",
    "CUDA_VERSION",
    "LD_PRELOAD",
    "NVIDIA_",
)
"""Variables about this machine's libraries, which an image has its own of."""


@dataclass(frozen=True)
class Ended:
    """What the engine says of a container at its end."""

    returncode: int | None = None
    """Exit status of the worker; None if it still ran or never started."""
    oom_killed: bool = False
    launched: Mapping[str, Any] = field(default_factory=dict)
    """Engine, host name and image of the container; empty if there was none."""


@dataclass(frozen=True)
class Container:
    """One container, named before it exists so that it can always be found."""

    engine: Engine
    image: str
    """As the settings name it."""
    digest: str
    run: Path
    """Folder of the run; beside the model cache the only one it may write to."""
    inputs: tuple[Path, ...]
    """Files and folders the settings name."""
    gpus: bool
    name: str = field(default_factory=lambda: f"ilora-bench-{secrets.token_hex(6)}")

    def command(self, words: Sequence[str], variables: Iterable[str]) -> list[str]:
        """Command line that runs `words` in it; `variables` are passed on by name.

        But for the image it differs from a process on the host as little as possible: same paths,
        user, network, cores and shared memory; no limit on memory.
        """
        program, *arguments = words
        return [
            *(self.engine.program, "run", "--name", self.name, "--hostname", self.name),
            *("--label", f"{LABEL}={self.run}", "--pull", "never", "--log-driver", "none"),
            *("--network", "host", "--add-host", f"{self.name}:127.0.0.1"),
            *("--security-opt", "label=disable", "--shm-size", str(_shared_memory_bytes())),
            *self._user(),
            *_cores(),
            *(self._gpu_flags() if self.gpus else ()),
            *(word for mount in self._mounts() for word in ("--mount", mount)),
            *("--workdir", str(Path.cwd())),
            *(word for name in sorted(variables) for word in ("--env", name)),
            *("--env", f"PYTHONPATH={REPOSITORY}", "--env", f"HF_HOME={_model_cache()}"),
            *("--env", "HOME=/tmp", "--env", "USER=worker"),
            *("--entrypoint", program, self.digest, *arguments),
        ]

    def _user(self) -> tuple[str, ...]:
        """Files are to belong to whoever runs this; rootless engines map root or keep the user."""
        if not self.engine.rootless:
            return ("--user", f"{os.getuid()}:{os.getgid()}")
        return ("--user", "0:0") if self.engine.name == "docker" else ("--userns", "keep-id")

    def _gpu_flags(self) -> tuple[str, ...]:
        """podman 4 takes `--gpus` and ignores it."""
        if self.engine.name == "docker":
            return ("--gpus", "all")
        return ("--device", "nvidia.com/gpu=all")

    def _mounts(self) -> Iterator[str]:
        """Everything at its own absolute path, links also at the place they point to."""
        writable = {path for one in (self.run, _model_cache()) for path in (one, one.resolve())}
        readable = {path for one in self.inputs for path in (one, one.resolve())}
        readable |= {REPOSITORY, Path.cwd()} - {Path("/")}
        for path in sorted(readable - writable):
            if not any(above in readable for above in path.parents):
                yield f'type=bind,"source={path}","target={path}",readonly'
        for path in sorted(writable):
            yield f'type=bind,"source={path}","target={path}"'

    def watch(self) -> "Watched":
        """From now on it is removed when this process ends, however that happens."""
        return Watched(self, _remover(self))


@dataclass(frozen=True)
class Watched:
    """A container and the process that removes it once nobody holds its input open any more."""

    container: Container
    remover: "subprocess.Popen[bytes]"

    def end(self) -> Ended:
        """Ask how it ended, then remove it, running or not. Raises UnfitMachine if that fails."""
        engine, name = self.container.engine, self.container.name
        ended = how_it_ended(self.container)
        assert self.remover.stdin is not None
        self.remover.stdin.close()
        try:
            self.remover.wait(REMOVAL_S)
        except subprocess.TimeoutExpired:
            self.remover.kill()
            self.remover.wait()
        if engine.inspect([name]):
            raise UnfitMachine(
                f"machine: {engine.name} does not remove the container {name}, which would disturb "
                f"what is measured next; {engine.name} rm --force {name}, then --resume"
            )
        return ended


def _remover(container: Container) -> "subprocess.Popen[bytes]":
    """Waits in a session of its own for the end of its input, which comes even after kill -9."""
    removal = container.engine.removal(container.name)
    return subprocess.Popen(
        ["sh", "-c", 'while read -r _; do :; done; exec "$@"', "remover", *removal],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def how_it_ended(container: Container) -> Ended:
    """The engine's account of a container, whether it has ended, still runs or never was."""
    found = container.engine.inspect([container.name])
    if not found:
        return Ended()
    state, config = found[0]["State"], found[0]["Config"]
    launched = {
        "engine": f"{container.engine.name} {container.engine.version}",
        "id": config["Hostname"],
        "image": container.image,
        "digest": full_digest(found[0]["Image"]),
        "gpus": container.gpus,
    }
    ran = state["Status"] in ("exited", "stopped", "dead")
    return Ended(state["ExitCode"] if ran else None, bool(state["OOMKilled"]), launched)


def without_advice(log: Sequence[str]) -> tuple[str, ...]:
    """A client's hint at its own help stands below its error and would hide it."""
    return tuple(
        line for line in log if line and not line.startswith(("Run 'docker", "See 'docker"))
    )


def remove_left_behind(engine: Engine, run: Path) -> list[str]:
    """Remove every container whose run nobody measures any more; their names.

    `run` is the folder of the caller, which holds its lock and has started nothing yet.
    """
    listed = engine.ask("ps", "--all", "--quiet", "--filter", f"label={LABEL}").stdout.split()
    names = []
    for found in engine.inspect(listed) if listed else ():
        folder = Path(found["Config"]["Labels"][LABEL])
        if folder == run.absolute() or not records.is_locked(folder / "records.jsonl"):
            names.append(found["Name"].lstrip("/"))
    if names:
        engine.ask(*engine.removal(*names)[1:], limit_s=REMOVAL_S)
    return names


def passed_on(environment: Mapping[str, str]) -> set[str]:
    """Names of this process's variables that a worker in an image is to have as well."""
    return {
        name
        for name in environment
        if name.startswith(VARIABLES) and not name.startswith(OF_THE_HOST)
    }


def _model_cache() -> Path:
    """Where the Hugging Face libraries keep models; made here, or every container had its own."""
    default = Path.home() / ".cache" / "huggingface"
    folder = Path(os.environ.get("HF_HOME") or default).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _shared_memory_bytes() -> int:
    """Size of this machine's /dev/shm: engines give 64 MiB, too little for loader workers."""
    space = os.statvfs("/dev/shm")
    return space.f_frsize * space.f_blocks


def _cores() -> tuple[str, ...]:
    """The cores this process is bound to: a container of a daemon does not inherit them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == os.cpu_count():
        return ()
    return ("--cpuset-cpus", ",".join(map(str, cores)))
