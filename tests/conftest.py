"""pytest 的設定：編譯讓第一個例子特別慢，所以 hypothesis 不限時間；例子固定，每次測一樣的。"""

import os

import hypothesis
import lessons

os.environ |= {key: value for key, value in lessons.environment().items() if key.startswith("JAX_")}
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # 測試的程式很小，編譯比執行久；子行程不這樣
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # 第 5 課要八個假裝置；要在 JAX 啟動之前

hypothesis.settings.register_profile("lessons", deadline=None, derandomize=True)
hypothesis.settings.load_profile("lessons")
