"""pytest 的設定：編譯讓第一個例子特別慢，所以 hypothesis 不限時間；例子固定，每次測一樣的。"""

import gc
import os
import sys

import hypothesis
import lessons
import pytest

os.environ |= {key: value for key, value in lessons.environment().items() if key.startswith("JAX_")}
os.environ |= lessons.FAST_COMPILE
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"  # 第 5 課要八個假裝置；要在 JAX 啟動之前

gc.set_threshold(100_000)  # 和 lesson.py 一樣：追蹤程式造出的物件不是垃圾，不必一再檢查

worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if worker and hasattr(os, "sched_setaffinity"):
    # 兩個 worker 各用一半的核心，子行程也是：兩個多執行緒的訓練搶同樣的核心，加起來比較慢
    half = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) % 2 :: 2]
    os.sched_setaffinity(0, half or os.sched_getaffinity(0))

hypothesis.settings.register_profile("lessons", deadline=None, derandomize=True)
hypothesis.settings.load_profile("lessons")


def pytest_collection_modifyitems(items):
    # 最久的先跑：第一個 worker 拿到的前八分之一，和第二個 worker 拿到的其餘差不多久，兩個才會一起結束
    items.sort(key=lambda item: "default_run" not in item.name)


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture
def call(monkeypatch, capsys):
    """在這個行程裡執行一課的 main：使用者的行程沒有差別的，例如被拒絕的旗標。回傳 (結束狀態, stdout, stderr)。"""

    def call(lesson: str, flags: str | list[str]) -> tuple[int, str, str]:
        module = lessons.load(lesson)
        monkeypatch.setattr(sys, "argv", [lessons.SCRIPTS[lesson], *lessons.arguments(flags)])
        capsys.readouterr()
        status = 0
        try:
            module.RUN(module.main)
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, *capsys.readouterr()

    return call
