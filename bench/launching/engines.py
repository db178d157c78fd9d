"""Container engines: which one answers here, and what it is asked."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

ENGINES = ("docker", "podman")
ANSWER_S = 30.0
OWN_IMAGES = ("cu118", "cu121")
"""Images built from this repository's Dockerfiles."""
FORMATS = {
    "docker": "{{.ServerVersion}} {{json .SecurityOptions}}",
    "podman": "{{.Version.Version}} rootless={{.Host.Security.Rootless}}",
}


@dataclass(frozen=True)
class Engine:
    """A container engine that answered."""

    name: str
    program: str
    version: str
    rootless: bool

    def ask(self, *words: str, limit_s: float = ANSWER_S) -> subprocess.CompletedProcess[str]:
        """Run one of its commands; one that cannot start or passes its limit counts as failed."""
        return _run([self.program, *words], limit_s)

    def inspect(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """What it knows of those of the containers that exist."""
        found: list[dict[str, Any]] = json.loads(
            self.ask("container", "inspect", *names).stdout or "[]"
        )
        return found

    def removal(self, *names: str) -> list[str]:
        """Command that ends and removes containers at once; podman would be patient with them."""
        at_once = ("--time", "0") if self.name == "podman" else ()
        return [self.program, "rm", "--force", "--volumes", *at_once, *names]

    def digest(self, image: str, limit_s: float = ANSWER_S) -> str | None:
        """Content address of an image it has; None without one."""
        done = self.ask("image", "inspect", "--format", "{{.Id}}", image, limit_s=limit_s)
        return None if done.returncode else full_digest(done.stdout.strip())


def full_digest(digest: str) -> str:
    """podman leaves the name of the hash away."""
    return digest if digest.startswith("sha256:") else f"sha256:{digest}"


def reference(image: str) -> str:
    """What an engine calls an image of the settings."""
    return f"ilora-bench:{image}" if image in OWN_IMAGES else image


def find(names: Sequence[str], limit_s: float) -> Engine | str:
    """The first of the engines that answers within the limit, or why none does."""
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: _ask_for_version(name, limit_s), names))
    for answer in answers:
        if isinstance(answer, Engine):
            return answer
    return "no container engine: " + ", ".join(map(str, answers))


def _ask_for_version(name: str, limit_s: float) -> Engine | str:
    program = shutil.which(name)
    if program is None:
        return f"{name} is not installed"
    done = _run([program, "info", "--format", FORMATS[name]], limit_s)
    version, _, about = done.stdout.strip().partition(" ")
    # Some clients exit 0 although their daemon is away.
    if done.returncode or not version or "annot connect" in done.stderr:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"{name} does not answer ({reason})"
    return Engine(name, program, version, "rootless=true" in about or "name=rootless" in about)


def _run(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"not within {limit_s:.1f} s")
