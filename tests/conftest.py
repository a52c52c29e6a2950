"""pytest 的設定：編譯讓第一個例子特別慢，所以 hypothesis 不限時間；例子固定，每次測一樣的。"""

import hypothesis

hypothesis.settings.register_profile("lessons", deadline=None, derandomize=True)
hypothesis.settings.load_profile("lessons")
