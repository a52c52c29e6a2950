"""幾台主機：旗標要彼此相合；連上其他行程；連上之後 Ctrl-C 立刻結束。第 5、6 課的這個檔案相同。"""

import os
import re
import signal
import socket
import sys
import threading

import jax

from lesson import LessonError

HEARTBEAT_SECONDS = 20  # 別的行程這麼久沒有消息，就當作停了


def check_processes(config) -> None:
    """幾台主機的旗標要彼此相合；不合就丟出 ValueError。"""
    number, coordinator = config.num_processes, config.coordinator
    if config.process_id >= number:
        right = f"行程從 0 數到 {number - 1} (--num-processes {number})"
        raise ValueError(f"--process-id 是 {config.process_id}；{right}")
    if number > 1 and not coordinator:
        raise ValueError(f"--num-processes 是 {number}，卻沒有 --coordinator；要是第 0 個行程的 HOST:PORT")
    if coordinator == "auto" and number > 1:
        wrong = f"--coordinator auto 與 --num-processes {number} 一起用"
        raise ValueError(f"{wrong}；auto 自己知道有幾個行程，不要寫 --num-processes")
    if coordinator in ("", "auto"):
        return
    parts = re.fullmatch(r"(\[[\da-fA-F:.%]+\]|[^\s:/\[\]]+):(\d{1,5})", coordinator)  # IPv6 要寫成 [::1]:9876
    if not (parts and 0 < int(parts[2]) < 2**16):
        raise ValueError(f"--coordinator 是 {coordinator}；要是 HOST:PORT，例如 127.0.0.1:9876，或 auto")


def connect(config) -> None:
    """和其他行程連上。之後 Ctrl-C 立刻結束：只停下一個行程，其他的等不到它，也只能結束。"""
    end_at_once()
    sys.excepthook = explain_lost_host
    jax.config.update("jax_enable_compilation_cache", False)  # 只有第 0 個行程寫快取；有的讀、有的編譯，會互相等
    try:
        if config.coordinator == "auto":
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        else:
            check_address(config)
            if config.num_processes > 1:
                print(f"等 {config.num_processes} 個行程連上 {config.coordinator}", file=sys.stderr, flush=True)
            jax.distributed.initialize(
                config.coordinator, config.num_processes, config.process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
            )
    except ValueError as error:
        wrong = "--coordinator auto 在這裡找不到 TPU 或 Slurm" if config.coordinator == "auto" else str(error)
        raise LessonError(f"{wrong}；要寫第 0 個行程的 HOST:PORT", 2) from error
    except RuntimeError as error:
        wrong = f"--coordinator {config.coordinator} 連不上 ({str(error).splitlines()[0]})"
        if "start RPC server" in str(error):  # auto 自己選的埠
            raise LessonError(f"{wrong}；那個埠有人佔著，用環境變數 JAX_COORDINATOR_PORT 換一個", 1) from error
        raise LessonError(f"{wrong}；要是第 0 個行程的 HOST:PORT，每個行程都要啟動", 1) from error
    take_signals()  # initialize 把 SIGTERM 換成它自己的，收到了也不結束


def explain_lost_host(kind, error, traceback) -> None:
    """別的行程停了，通訊就失敗：說一句話就結束，不等 JAX 收攤 (它會一直等那個行程)。"""
    if not issubclass(kind, jax.errors.JaxRuntimeError):
        return sys.__excepthook__(kind, error, traceback)
    wrong = f"和別的行程斷了線，或裝置出了錯 ({str(error).splitlines()[0]})"
    print(f"錯誤：{wrong}；每個行程都重新啟動", file=sys.stderr, flush=True)
    os._exit(1)


def check_address(config) -> None:
    """主機的名字要查得到。第 0 個行程要在那個埠上等別人；埠被佔著時 jaxlib 會直接當掉 (segmentation fault)。"""
    host, _, port = config.coordinator.rpartition(":")
    try:
        family, kind, *_ = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError：名字太長
        right = "要是第 0 個行程的 HOST:PORT"
        raise LessonError(f"--coordinator {config.coordinator} 查不到 ({error})；{right}", 2) from error
    if config.process_id > 0:
        return
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # 剛結束的行程留下的，不算佔著
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            wrong = f"--coordinator {config.coordinator} 的埠開不了 ({error.strerror})"
            raise LessonError(f"{wrong}；換一個埠，或結束佔著它的行程", 2) from error


def end_at_once() -> None:
    """收到 Ctrl-C 或 SIGTERM 就以 130 結束，主執行緒卡在 XLA 裡等別人時也一樣。"""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())  # 訊號一到，不等主執行緒，就寫進這裡
    take_signals()

    def wait() -> None:
        reader.recv(1)
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()
    end_at_once.sockets = reader, writer


def take_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
