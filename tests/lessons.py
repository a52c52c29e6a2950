"""測試與 benchmark.py 共用：找到每一課、載入腳本、像使用者一樣在子行程裡執行。"""

import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(folder.name for folder in ROOT.glob("[0-9]_*") if folder.is_dir())
SCRIPTS = {
    "1_Q_Learning": "Q_Learning.py",
    "2_Cart_Pole_DQN": "cart_pole_dqn.py",
    "3_Pendulum": "pendulum.py",
    "4_GRPO_MNIST": "grpo_mnist.py",
    "5_Sharding_Demo": "sharding_demo.py",
    "6_GRPO_LLM": "grpo_llm.py",
}
READMES = [ROOT / "README.md", *(ROOT / lesson / "README.md" for lesson in LESSONS)]

# 每一課：幾秒就結束的旗標；不按 Ctrl-C 就不結束的；合起來用到每一個旗標的幾組短跑；錯的值；README 的結果表列出的數字。
SHORT = {
    "1_Q_Learning": "--episodes 300 --decay-episodes 150",
    "2_Cart_Pole_DQN": "--total-steps 2000 --updates-per-train 16",
    "3_Pendulum": "--total-steps 1600 --num-envs 4 --train-epochs 2",
    "4_GRPO_MNIST": "--num-epochs 1 --batch-size 8192 --train-epochs 2",
    "5_Sharding_Demo": "--strategies data_model --steps 2 --num-layers 1 --sequence-length 32",
    "6_GRPO_LLM": "--num-layers 1 --embed-dim 16 --num-heads 2 --mlp-dim 32 --pretrain-steps 2 "
    "--pretrain-batch-size 16 --num-prompts 8 --group-size 2 --updates 2",
}
LONG = {
    "1_Q_Learning": "--episodes 1000000",
    "2_Cart_Pole_DQN": "--total-steps 1000000 --updates-per-train 16 --no-early-stop",
    "3_Pendulum": "--total-steps 1000000 --num-envs 4 --train-epochs 2",
    "4_GRPO_MNIST": "--num-epochs 1000 --batch-size 8192 --train-epochs 2",
    "5_Sharding_Demo": "--strategies data_model --steps 1000000 --num-layers 1 --sequence-length 32",
    "6_GRPO_LLM": "--num-layers 1 --embed-dim 16 --num-heads 2 --mlp-dim 32 --pretrain-steps 2 "
    "--pretrain-batch-size 16 --num-prompts 8 --group-size 2 --updates 1000000",
}
EVERY_FLAG = {
    "1_Q_Learning": [
        "--seed 7 --grid-size 3 --slip 0.1 --episodes 99 --max-steps 20 --alpha 0.5 --alpha-decay 0.7 --gamma 0.9 "
        "--initial-q -5 --epsilon-start 0.5 --epsilon-end 0.1 --decay-episodes 50",
        "--grid-size 2 --episodes 1 --gamma 1 --alpha 1 --slip 1",
        "--grid-size 12 --episodes 200 --epsilon-start 0 --epsilon-end 0",
    ],
    "2_Cart_Pole_DQN": [
        "--seed 7 --total-steps 1500 --num-envs 3 --buffer-size 300 --learning-starts 200 --train-every 100 "
        "--updates-per-train 5 --batch-size 32 --sync-every 3 --learning-rate 3e-3 --gamma 0.9 --epsilon-end 0.1 "
        "--epsilon-steps 500 --hidden-size 16 --no-normalize-observations --double --no-early-stop",
        "--total-steps 1200 --no-replay --no-target-network",
    ],
    "3_Pendulum": [
        "--algorithm ppo_kl --beta 0.5 --no-normalize-advantages --no-normalize-observations --reward-scale 1 "
        "--sigma-bias 0 --hidden-size 16 --no-anneal-learning-rate --max-grad-norm 1e9 "
        "--actor-learning-rate 3e-4 --critic-learning-rate 3e-3 --gamma 0.9 --gae-lambda 0.9 --clip-epsilon 0.1 "
        "--seed 7 --num-steps 50 --num-envs 3 --minibatch-size 40 --train-epochs 3 --total-steps 700",
        "--algorithm reinforce --num-envs 2 --total-steps 800",
    ],
    "4_GRPO_MNIST": [
        "--seed 7 --num-epochs 1 --batch-size 3000 --group image --group-size 3 --train-epochs 3 --beta 0.1 "
        "--learning-rate 1e-3 --no-anneal-learning-rate --clip-epsilon 0.1",
        "--num-epochs 1 --batch-size 8192 --algorithm ppo --baseline group --train-epochs 1",
    ],
    "5_Sharding_Demo": [
        "--strategies single --rules batch=data,mlp=model,embed=None --mesh 2x4 --seed 7 --steps 2 --batch-size 8 "
        "--sequence-length 16 --num-layers 1 --embed-dim 64 --mlp-dim 64 --num-heads 8 --num-kv-heads 4 "
        "--learning-rate 3e-3",
        "--ledger llama3-8b --ledger-meshes 1x64 --strategies model --compile-for none",
    ],
    "6_GRPO_LLM": [
        "--num-layers 1 --embed-dim 16 --num-heads 2 --mlp-dim 32 --seed 7 --pretrain-steps 3 --pretrain-batch-size 8 "
        "--step-by-step-share 1 --pretrain-learning-rate 1e-3 --num-prompts 4 --group-size 4 --updates 2 "
        "--train-epochs 2 --learning-rate 1e-3 --anneal-learning-rate --clip-epsilon 0.1 --beta 0.1 "
        "--loss-average dr_grpo --reward last-digit --dynamic-sampling --mesh 2x1 --rules batch=data,mlp=model",
        "--num-layers 1 --embed-dim 16 --num-heads 2 --mlp-dim 32 --pretrain-steps 2 --pretrain-batch-size 16 "
        "--num-prompts 8 --group-size 1 --updates 1 --algorithm ppo --critic-learning-rate 1e-2 --gae-lambda 0.9",
        "--measure ledger",
    ],
}
WRONG = {
    "1_Q_Learning": [
        "--seed abc",
        "--no-such-flag 1",
        "--seed -1",
        "--grid-size 1",
        "--grid-size 13",
        "--grid-size 8 --max-steps 13",
        "--slip 1.5",
        "--episodes 0",
        "--alpha nan",
        "--gamma -0.1",
        "--initial-q inf",
        "--epsilon-start 2",
        "--epsilon-end -1",
        "--decay-episodes 0",
        "--alpha 0",
        "--alpha-decay 2",
        "--episodes 1000000000000",
        "--compare --seed 7",
        "--compare --initial-q -200",
    ],
    "2_Cart_Pole_DQN": [
        "--seed -1",
        "--no-such-flag 1",
        "--batch-size 0",
        "--num-envs 0",
        "--hidden-size wide",
        "--gamma 1",
        "--epsilon-end 1.5",
        "--learning-rate nan",
        "--total-steps 100",
        "--buffer-size 100",
        "--no-replay --updates-per-train 50",
        "--no-replay --learning-starts 100",
        "--double --no-target-network",
        "--watch no-such-file.npz",
        "--learning-rate 0",
        "--total-steps 1000000000000000000",
        "--num-envs 1000000000000000000",
        "--buffer-size 1000000000000000000",
        "--updates-per-train 1000000000000000000",
        "--batch-size 1000000000000000000",
        "--hidden-size 1000000000000000000",
        "--updates-per-train 1000000 --batch-size 1000000",
        "--batch-size 1000000 --hidden-size 10000",
        "--no-replay --train-every 9000000 --updates-per-train 1 --buffer-size 10000000 --learning-starts 9000000 "
        "--total-steps 10000000 --hidden-size 1000",
        "--compare --seed 7",
        "--compare --no-replay",
        "--compare --no-target-network",
        "--compare --double",
        "--compare --watch weights.npz",
        "--compare --total-steps 60000",
        "--compare --learning-starts 50000",
        "--compare --train-every 100",
    ],
    "3_Pendulum": [
        "--seed abc",
        "--no-such-flag 1",
        "--algorithm sarsa",
        "--minibatch-size 0",
        "--minibatch-size 1",
        "--minibatch-size 5000",
        "--total-steps 100",
        "--total-steps 30000000000",
        "--gamma 1.5",
        "--actor-learning-rate nan",
        "--actor-learning-rate 0",
        "--max-grad-norm 0",
        "--reward-scale 1e30",
        "--hidden-size 1000000000000000000",
        "--total-steps 1000000000 --minibatch-size 2 --train-epochs 1000",
        "--num-envs 10000 --num-steps 10000 --total-steps 1000000000",
        "--algorithm reinforce --num-steps 128",
        "--compare --seed 7",
        "--compare --num-steps 128",
        "--compare --num-steps 400 --minibatch-size 4000",
        "--compare --num-envs 1 --num-steps 200 --minibatch-size 201",
        "--compare --total-steps 12799",
        "--compare --algorithm ppo_kl",
        "--compare --watch no-such-file.npz",
        "--watch no-such-file.npz",
    ],
    "4_GRPO_MNIST": [
        "--seed abc",
        "--no-such-flag 1",
        "--algorithm dqn",
        "--num-epochs 0",
        "--batch-size 1",
        "--batch-size 60001",
        "--batch-size 60000 --group-size 100",
        "--group-size 0",
        "--group label",
        "--group image --group-size 1",
        "--group image --baseline moving-average",
        "--algorithm ppo --group image",
        "--algorithm ppo --baseline moving-average",
        "--compare --seed 7",
        "--compare --baseline moving-average",
        "--train-epochs 0",
        "--learning-rate nan",
        "--learning-rate 0",
        "--learning-rate 1000000000000000000",
        "--clip-epsilon 1.5",
        "--clip-epsilon 0",
        "--beta -1",
        "--beta 1e18",
        "--num-epochs 1000000000000000000",
        "--group-size 1000000000000000000",
        "--train-epochs 1000000000000000000",
        "--algorithm supervised --beta 0.1",
        "--algorithm supervised --group image",
        "--compare --algorithm ppo",
        "--compare --group image",
        "--compare --batch-size 60000 --group-size 18",
    ],
    "5_Sharding_Demo": [
        "--seed -1",
        "--no-such-flag 1",
        "--strategies pipeline",
        "--mesh 3x2",
        "--mesh 8",
        "--mesh 0x8",
        "--rules batch",
        "--rules width=model",
        "--rules mlp=pipe",
        "--rules mlp=data+data",
        "--rules embed=model,mlp=model",
        "--rules batch=data,sequence=data",
        "--batch-size 6",
        "--mlp-dim 100",
        "--num-kv-heads 4",
        "--num-kv-heads 5",
        "--embed-dim 100",
        "--steps 0",
        "--learning-rate nan",
        "--ledger llama9",
        "--ledger-meshes 64x64",
        "--compile-for b200",
        "--compile-for h100 --steps 5",
        "--compile-for v5p --mesh 3x2",
        "--compile-for h100 --ledger llama3-8b --ledger-meshes 16x16",
        "--compile-for v5p --coordinator 127.0.0.1:9 --num-processes 2",
        "--num-processes 2",
        "--coordinator nowhere",
        "--coordinator 127.0.0.1:9 --num-processes 2 --process-id 2",
        "--coordinator auto --num-processes 2",
        "--coordinator http://127.0.0.1:9876 --num-processes 2",
        "--coordinator ::1:9876 --num-processes 2",
        "--ledger llama3-8b --coordinator 127.0.0.1:9",
        "--coordinator 127.0.0.1:99999 --num-processes 2",
        "--rules batch=data,batch=model",
        "--rules mlp=data,mlp=data",
        "--ledger llama3-8b --steps 5",
        "--ledger-meshes 4x2 8x8",
        "--learning-rate 0",
        "--mlp-dim 1000000000000000000",
        "--batch-size 100000",
        "--embed-dim 32000",
    ],
    "6_GRPO_LLM": [
        "--seed abc",
        "--no-such-flag 1",
        "--algorithm dqn",
        "--embed-dim 97",
        "--group-size 1",
        "--num-prompts 4096 --group-size 1024",
        "--num-prompts 7",
        "--step-by-step-share 1.5",
        "--pretrain-batch-size 31",
        "--pretrain-batch-size 8",
        "--step-by-step-share 0.05",
        "--learning-rate nan",
        "--clip-epsilon 1.5",
        "--beta -1",
        "--loss-average mean",
        "--reward half",
        "--algorithm ppo --dynamic-sampling",
        "--algorithm ppo --loss-average dr_grpo",
        "--mesh 8",
        "--mesh 3x2",
        "--mesh 99x99",
        "--rules batch",
        "--rules width=model",
        "--rules mlp=pipe",
        "--rules mlp=data+data",
        "--rules batch=data,batch=model",
        "--rules embed=model,mlp=model",
        "--num-processes 2",
        "--coordinator nowhere",
        "--coordinator 127.0.0.1:9 --num-processes 2 --process-id 2",
        "--coordinator auto --num-processes 2",
        "--base no-such-file.npz",
        "--compare --base no-such-file.npz",
        "--compare --algorithm ppo",
        "--compare --group-size 4",
        "--base no-such-file.npz --pretrain-steps 5",
        "--algorithm supervised --reward last-digit",
        "--compare --measure cost",
        "--compare --coordinator 127.0.0.1:9876 --num-processes 2",
        "--measure mesh --mesh 2x1",
        "--measure mesh --num-heads 2",
        "--measure cost --group-size 4",
        "--measure ledger --updates 5",
        "--measure ledger --beta 0.3",
    ],
}
RESULTS = {
    "1_Q_Learning": {
        "max_abs_error": ("與 Q* 的最大差距", "{:.1e}"),
        "greedy_return": ("貪婪回報", "{:.1f}"),
    },
    "2_Cart_Pole_DQN": {
        "eval_mean": ("評估 100 回合的平均回報", "{:.1f}"),
        "env_steps": ("訓練走了幾步", "{:,.0f}"),
    },
    "3_Pendulum": {"eval_mean": ("評估 100 回合的平均回報", "{:.1f}")},
    "4_GRPO_MNIST": {  # 每輪一個數字的，取最後一輪
        "train_accuracy": ("訓練集，採樣的準確率 (%)", "{:.2f}"),
        "test_accuracy": ("測試集，貪婪的準確率 (%)", "{:.2f}"),
        "missing_digits": ("測試集上一次都不猜的數字有幾個", "{:.2g}"),
    },
    "5_Sharding_Demo": {"max_relative_difference": ("損失與 single 的最大相對差", "{:.1e}")},
    "6_GRPO_LLM": {
        "greedy": ("GRPO 之後，測試題貪婪的正確率 (%)", "{:.1f}"),
        "sampled": ("GRPO 之後，測試題採樣的正確率 (%)", "{:.1f}"),
        "base_sampled": ("基礎模型，測試題採樣的正確率 (%)", "{:.1f}"),
    },
}
# 專案的 README 最上面的總表：課名、問題、RESULTS 裡的哪個數字、目標。
FRONT_PAGE = {
    "1_Q_Learning": ("第 1 課：Q-Learning", "沒有地圖，怎麼用一張表學會最短的路？", "max_abs_error", "1e-6 以下"),
    "2_Cart_Pole_DQN": ("第 2 課：DQN", "表格放不下，換成神經網路會出什麼問題？", "eval_mean", "475 以上"),
    "3_Pendulum": ("第 3 課：PPO", "動作是連續的，怎麼直接學策略？", "eval_mean", "−175 以上"),
    "4_GRPO_MNIST": ("第 4 課：GRPO", "不要評論家，整批的答案互相比較夠不夠？", "test_accuracy", "97.2 以上"),
    "5_Sharding_Demo": (
        "第 5 課：Mesh",
        "模型放不進一顆晶片，怎麼切？切完算的還一樣嗎？",
        "max_relative_difference",
        "1e-4 以下",
    ),
    "6_GRPO_LLM": (
        "第 6 課：語言模型的 GRPO",
        "寫完幾十個詞元才有一個獎勵，一群答案互相比較還夠嗎？",
        "sampled",
        "88 以上",
    ),
}
# 與隨機種子無關的數字，試驗表裡各佔一欄。
CONSTANTS = {
    "5_Sharding_Demo": {
        "device_kb": ("一個裝置的參數、梯度、動差 (KB)", "{:,.1f}"),
        "collective_kb": ("一步的通訊量 (KB)", "{:,.1f}"),
    },
}
# README 的比較表：區塊與紀錄檔的名字 → 旗標、metrics.json 的鍵、畫表格的函式。
COMPARISONS = {
    "5_Sharding_Demo": {
        "comparison": ("", "strategies", "comparison_table"),
        "ledger": ("--ledger llama3-8b", "ledger", "ledger_table"),
        "ledger_h100": ("--ledger llama3-8b --compile-for h100", "ledger", "ledger_table"),
        "ledger_v5p": ("--ledger llama3-8b --compile-for v5p --ledger-meshes 4x2", "ledger", "ledger_table"),
        "compiled_h100": ("--compile-for h100", "compiled", "collectives_table"),
        "compiled_v5p": ("--compile-for v5p", "compiled", "collectives_table"),
        "samples": ("--strategies single --steps 300", "samples", "samples_text"),
        "ledger_70b": ("--ledger llama3-70b", "ledger", "ledger_table"),
        "ledger_70b_h100": ("--ledger llama3-70b --compile-for h100", "ledger", "ledger_table"),
        "ledger_70b_kv": (
            "--ledger llama3-70b --compile-for h100 --ledger-meshes 8x8 --strategies single "
            "--rules vocab=data+model,heads=data+model,mlp=data+model",
            "ledger",
            "ledger_table",
        ),
    },
    "6_GRPO_LLM": {
        "comparison": ("--compare", "comparison", "comparison_table"),
        "mesh": ("--measure mesh", "strategies", "strategy_table"),
        "cost": ("--measure cost", "cost", "cost_table"),
        "ledger": ("--measure ledger", "ledger", "ledger_table"),
    },
}
# 換了題目的旗標：分數不能和原來的題目比。
TASK_FLAGS = {"1_Q_Learning": ("--slip", "--grid-size", "--gamma")}
HIGHER_IS_BETTER = {
    "eval_mean": True,
    "env_steps": False,
    "max_abs_error": False,
    "greedy_return": True,
    "train_accuracy": True,
    "test_accuracy": True,
    "missing_digits": False,
    "max_relative_difference": False,
    "greedy": True,
    "sampled": True,
    "base_sampled": True,
}  # 試驗表的「最差」往哪邊找


# 短跑編譯比執行久：用 XLA 舊的、編譯得快的產生器，機器碼不最佳化。第 6 課的短跑從 26 秒的 CPU 時間變成 10 秒。
# conftest.py 也這樣設 pytest 自己的行程，再加上假裝置；完整執行與紀錄不這樣。
FAST_COMPILE = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def script(lesson: str) -> Path:
    """這一課要執行的腳本；資料夾裡其他的 .py 是它匯入的。"""
    return ROOT / lesson / SCRIPTS[lesson]


@functools.cache
def load(lesson: str) -> ModuleType:
    """像讀者在筆記本裡那樣匯入：資料夾放進 sys.path，再匯入腳本。"""
    sys.path.insert(0, str(ROOT / lesson))
    return importlib.import_module(script(lesson).stem)


def environment() -> dict[str, str]:
    """完整執行與紀錄的環境：碰到網路就以狀態 97 結束 (見 no_network/sitecustomize.py)；編譯過的程式在測試之間共用。

    pytest 自己的假裝置與編譯設定 (見 conftest.py) 不傳下去：子行程和使用者的一樣。
    """
    return {name: value for name, value in os.environ.items() if name not in FAST_COMPILE} | {
        "PYTHONPATH": str(ROOT / "tests" / "no_network"),
        "PYTHONUTF8": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def short_environment() -> dict[str, str]:
    """短跑的環境：只有編譯得快，其他和完整執行的一樣。"""
    return environment() | FAST_COMPILE


def arguments(flags: str | list[str]) -> list[str]:
    return flags.split() if isinstance(flags, str) else flags


def run(
    lesson: str, flags: str | list[str], cwd: Path, env: dict | None = None, path: Path | None = None
) -> subprocess.CompletedProcess:
    """在子行程裡執行一課，或複製到 path 的那一支；工作目錄是 cwd，不是專案的根目錄。沒有給 env 就是短跑的環境。"""
    command = [sys.executable, str(path or script(lesson)), *arguments(flags)]
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 900}
    return subprocess.run(command, cwd=cwd, env=env or short_environment(), **options)


def metrics(out_dir: Path) -> dict:
    return json.loads((out_dir / "metrics.json").read_text(encoding="utf-8"))


def config_fields(lesson: str) -> list[tuple[str, str, str]]:
    """Config 的每個欄位：(名字, 預設值, 說明)；說明是同一行最後的註解。"""
    config_class = load(lesson).Config
    source = inspect.getsource(config_class)
    return [
        (name, show_default(getattr(config_class, name)), re.search(rf"^    {name}: .*?  # (.*)$", source, re.M)[1])
        for name in config_class.__dataclass_fields__
    ]


def defaults(lesson: str) -> dict[str, str]:
    """預設值，不含 --out-dir；和紀錄一起存，預設值一變，測試就知道紀錄過期了。"""
    return {name: default for name, default, _ in config_fields(lesson) if name != "out_dir"}


def show_default(value) -> str:
    if isinstance(value, bool):
        return "開" if value else "關"
    if value is None or value == "":
        return "無"
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, Path):
        return value.relative_to(value.parent.parent).name + "/"
    return f"{value:,}" if isinstance(value, int) else str(value)


def block(text: str, name: str) -> str:
    """README 裡 <!-- name:begin --> 與 <!-- name:end --> 之間的內容。"""
    match = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
    if match is None:
        raise ValueError(f"no block {name!r}")
    return match[1]


def replace_block(path: Path, name: str, content: str) -> None:
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    text = path.read_text(encoding="utf-8")
    old = begin + block(text, name) + end
    path.write_text(text.replace(old, begin + content + end), encoding="utf-8")


def config_table(lesson: str) -> str:
    """README 的超參數表。"""
    rows = [f"| `--{name.replace('_', '-')}` | {default} | {doc} |" for name, default, doc in config_fields(lesson)]
    return "\n".join(["| 旗標 | 預設值 | 說明 |", "| --- | --- | --- |", *rows]) + "\n"
