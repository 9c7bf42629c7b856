"""nginx and Caddy before two APIs, as docs/operations.md has them, tried as they stand there."""

import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from local.lifetime import ending_with_us
from local.processes import free_port
from settings import ROOT
from tests.waiting import wait_until

ROOT_PATH = "/celeriac"  # in both blocks
NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 4096; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {upstream}
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""
CADDY = """
{{
    admin off
    auto_https off
    storage file_system {folder}/storage
}}
{site}
"""


def documented(language: str, part: str) -> str:
    """The block of docs/operations.md that has `part`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
    [found] = [block for block in blocks if part in block]
    return str(found)


def nginx_config(folder: Path, port: int, api_ports: Sequence[int]) -> str:
    block = documented("nginx", "upstream celeriac")
    line = next(line for line in block.splitlines(keepends=True) if " server " in line)
    servers = "".join(line.replace("10.0.0.1:8000", f"127.0.0.1:{one}") for one in api_ports)
    upstream = re.sub(r"( +server .*\n)+", servers, block, count=1)
    location = documented("nginx", "location /celeriac/").replace("http://127.0.0.1:8000", "http://celeriac")
    return NGINX.format(folder=folder, port=port, upstream=upstream, location=location)


def caddy_config(folder: Path, port: int, api_ports: Sequence[int], flower_port: int = 5555) -> str:
    site = documented("caddy", "example.com {").replace("example.com {", f"http://127.0.0.1:{port} {{")
    addresses = " ".join(f"127.0.0.1:{one}" for one in api_ports)
    site = re.sub(r"reverse_proxy [^{\n]*8000[^{\n]*", f"reverse_proxy {addresses} ", site)
    return CADDY.format(folder=folder, site=site.replace("5555", str(flower_port)))


@contextmanager
def front(kind: str, api_ports: Sequence[int]) -> Iterator[str]:
    """A proxy, and the URL of the APIs behind it."""
    program = shutil.which(kind) or shutil.which(kind, path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise FileNotFoundError(f"{kind} is not installed; on Debian: apt-get install {kind}")
    folder, port = Path(tempfile.mkdtemp(prefix=f"celeriac-{kind}-")), free_port("127.0.0.1", 0)
    config = folder / "config"
    make = nginx_config if kind == "nginx" else caddy_config
    config.write_text(make(folder, port, api_ports))
    options = ["-e", str(folder / "error.log"), "-c", str(config)]
    if kind == "caddy":
        options = ["run", "--config", str(config), "--adapter", "caddyfile"]
    command = ending_with_us([program, *options], signal_number=signal.SIGTERM)
    environment = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (
        (folder / "output.log").open("wb") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        url = f"http://127.0.0.1:{port}{ROOT_PATH}"
        try:
            wait_until(lambda: _answers(url), f"{kind} answers", pause_seconds=0.1)
            yield url
        finally:
            process.terminate()
            process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
