"""每一課都在 no_network/sitecustomize.py 底下執行；這裡確定它真的擋得住。"""

import subprocess
import sys

import lessons
import pytest


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.socket().connect_ex(('192.0.2.1', 80))",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "socket.getaddrinfo('example.org', 80)",
    ],
)
def test_a_connection_ends_the_process(attempt):
    command = [sys.executable, "-c", f"import socket; {attempt}"]
    result = subprocess.run(command, env=lessons.environment(), capture_output=True, text=True)
    assert result.returncode == 97
    assert "network access" in result.stderr
