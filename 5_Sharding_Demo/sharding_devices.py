"""第 5 課的裝置：有幾個、從哪裡來；幾件編譯怎麼同時做。"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
from hosts import connect
from jax.extend import backend
from tqdm import tqdm

import lesson

FAKE_DEVICES = 8
COUNT_FLAG = "--xla_force_host_platform_device_count"
COUNT_VARIABLE = "JAX_NUM_CPU_DEVICES"  # 它比 XLA_FLAGS 優先


def start_devices(config, needed: int) -> None:
    """在 JAX 啟動之前決定裝置：CPU 分成幾個假裝置；幾台主機時先互相連上。needed：Mesh 要幾個。

    Raises:
        lesson.LessonError: 裝置的個數不合，說明個數是誰決定的。
    """
    if config.compile_for != "none":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # 超過 XLA 自己的上限 (記憶體的八成)，每個程式抱怨兩行；不印
        jax.config.update("jax_enable_compilation_cache", False)  # 沒有晶片，編譯好的讀不回來
    only_compiles = config.ledger != "none" or config.compile_for != "none"
    wanted = needed if only_compiles else max(1, FAKE_DEVICES // config.num_processes)
    try:
        choose_devices(wanted, only_compiles)
    except RuntimeError:  # 筆記本裡，JAX 已經用別的個數啟動了：重新啟動它
        backend.clear_backends()
        choose_devices(wanted, only_compiles)
    if config.coordinator:
        connect(config)
    lesson.find_devices()
    found = jax.device_count()
    if found < needed or (found > needed and not only_compiles):
        wrong = (
            f"{'--ledger-meshes' if only_compiles else f'--mesh {config.mesh}'} 要 {needed} 個裝置，這裡有 {found} 個"
        )
        raise lesson.LessonError(f"{wrong}；{right_devices(wanted, found, only_compiles)}", 2)


def count_is_set_by() -> str:
    """讀者自己用哪個環境變數設了假裝置的個數；沒有就是空的。"""
    if os.environ.get(COUNT_VARIABLE):
        return COUNT_VARIABLE
    return "XLA_FLAGS" if COUNT_FLAG in os.environ.get("XLA_FLAGS", "") else ""


def choose_devices(wanted: int, only_compiles: bool) -> None:
    """讀者沒有自己設個數，CPU 就當成 wanted 個裝置；有 GPU 或 TPU 時，這一行不相干。"""
    if only_compiles:
        jax.config.update("jax_platforms", "cpu")  # 只編譯、不執行，用假裝置就夠了
    if not count_is_set_by():
        jax.config.update("jax_num_cpu_devices", wanted)


def right_devices(wanted: int, found: int, only_compiles: bool) -> str:
    """裝置的個數不合時，怎樣才對。"""
    fits = "、".join(f"{n}x{found // n}" for n in range(1, found + 1) if found % n == 0)
    right = [] if only_compiles else [f"{fits} 才合"]
    if jax.default_backend() != "cpu":
        right.append("想用八個假裝置，設 JAX_PLATFORMS=cpu")
    elif count_is_set_by() and found != wanted:
        right.append(f"個數是環境變數 {count_is_set_by()} 設的，拿掉它就有 {wanted} 個")
    return "；".join(right)


def progress_bar(description: str, total: int, unit: str, progress: bool = True) -> tqdm:
    """stderr 不是終端機就不畫。"""
    return tqdm(total=total, desc=description, unit=unit, disable=None if progress else True)


def side_by_side(jobs: list[Callable], stop: threading.Event | None = None, progress: bool = True) -> list:
    """幾件編譯同時做：XLA 編譯時放開 GIL。stop 被設定之後，還沒開始的不做，結果是 None。"""
    workers = 1 if jax.process_count() > 1 else os.cpu_count()  # 幾個行程時，每個行程的順序要相同

    def work(job: Callable):
        return None if stop and stop.is_set() else job()

    results = []
    with ThreadPoolExecutor(workers) as pool, progress_bar("編譯", len(jobs), "個程式", progress) as bar:
        for future in [pool.submit(work, job) for job in jobs]:
            results.append(future.result())
            bar.update()
    return results
