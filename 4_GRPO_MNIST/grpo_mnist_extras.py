"""第 4 課跑完之後看的東西：記憶體的帳、兩張圖、--compare。腳本把要用的函式傳進來，這裡不匯入腳本。

預設執行的兩張圖自己排版 (subplots_adjust)，省下自動排版 (layout) 的時間。
"""

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from matplotlib.ticker import MaxNLocator

import lesson_extras
from lesson_extras import array_bytes, derive, draw_mean, figure, markdown_table, show_difference, show_mean

with warnings.catch_warnings(action="ignore"):  # 它匯入時用了 JAX 將要移除的東西，讀者管不著；腳本從這裡之後才匯入它
    import tensorflow_probability.substrates.jax  # noqa: F401

# 筆記的設定：一張圖片一個答案，學一遍，學習率固定；--compare 拿它和預設值比。
NOTES_SETTINGS = {
    "batch_size": 1024,
    "group_size": 1,
    "train_epochs": 1,
    "learning_rate": 1e-4,
    "anneal_learning_rate": False,
}
BATCH_SIZES = (64, 256, 1024, 4096)
STATE_NAMES = {"parameters": "parameters", "gradients": "gradients", "moments": "Adam moments"}
SPREAD_BATCHES = 500  # 量基線抖動多大，各抽幾個批次


class Epoch(NamedTuple):
    """一輪的成績；metrics.json 與 --compare 記的就是這幾欄，一輪一個數字。"""

    train_accuracy: float  # 訓練時採樣的準確率 (%)，筆記印的數字
    test_accuracy: float  # 這一輪之後，測試集上貪婪的準確率 (%)
    missing_digits: int  # 測試集上一次都不猜的數字有幾個
    clip_fractions: float  # 最後一遍更新之前，比例在界線之外的比率
    silent_shares: float  # 優勢是 0 的答案的比率
    residuals: float  # 平均 (獎勵 - 基線)² 除以獎勵的變異數；1 是什麼都沒解釋


def summarize(log: dict[str, np.ndarray], test_accuracy: float, missing_digits: int) -> Epoch:
    """log 是 train_epoch 的紀錄，第一維是批次，loss 與 clip_fraction 的第二維是第幾遍。"""
    accuracy = float(log["reward"].mean())
    residual = float(log["residual"].mean()) / max(accuracy * (1 - accuracy), 1e-12)
    clip_fraction, silent = float(log["clip_fraction"][:, -1].mean()), float(log["silent"].mean())
    return Epoch(100 * accuracy, test_accuracy, missing_digits, clip_fraction, silent, residual)


def remarks(last: Epoch, config) -> list[str]:
    """最後一輪有什麼不對勁：準確率看不出來的。"""
    why = "為什麼，見 README 的「少了一個數字」" if last.missing_digits < 3 else "把學習率調小再試"
    missing = f"測試集上有 {last.missing_digits} 個數字一次都不猜；{why}"
    silent = "最後一輪每個答案的優勢都是 0，沒有學到東西；把學習率調小再試"
    nothing_learnt = last.silent_shares == 1 and config.algorithm != "supervised"  # supervised 不用優勢
    return [missing] * (last.missing_digits > 0) + [silent] * nothing_learnt


def columns(history: list[Epoch]) -> dict[str, list]:
    """一輪一列換成一欄一個串列。"""
    return dict(zip(Epoch._fields, map(list, zip(*history, strict=True)), strict=True))


def parameter_count(module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


def memory_bytes(agent) -> dict[str, int]:
    """訓練時要記住的東西，各佔幾個位元組，從陣列量出來。"""
    models = [model for model in (agent.actor, agent.critic) if model]
    optimizers = [optimizer for optimizer in (agent.actor_optimizer, agent.critic_optimizer) if optimizer]
    parameters = array_bytes([nnx.state(model, nnx.Param) for model in models])
    return {
        "parameters": parameters,
        "gradients": parameters,  # 梯度和參數一樣多
        "moments": array_bytes([nnx.state(optimizer) for optimizer in optimizers]),
        "reference": array_bytes(nnx.state(agent.reference, nnx.Param)) if agent.reference else 0,
    }


# 圖 --------------------------------------------------------------------------------------------------


def draw_learning_curve(columns: dict, config, train_target: float, test_target: float) -> None:
    """learning_curve.png：兩種準確率，以及各自的目標。"""
    curves = (
        ("training set, sampled", columns["train_accuracy"], train_target, "C0"),
        ("test set, greedy", columns["test_accuracy"], test_target, "C1"),
    )
    with figure(config.out_dir / "learning_curve.png", figsize=(7, 4), layout="none") as (canvas, axes):
        canvas.subplots_adjust(left=0.1, right=0.97, bottom=0.12, top=0.92)
        for label, accuracy, target, color in curves:
            epochs = range(1, len(accuracy) + 1)
            axes.plot(epochs, accuracy, "o-", color=color, label=f"{label}: {accuracy[-1]:.2f} %")
            axes.axhline(target, color=color, linestyle=":", label=f"target: {target} %")
        axes.set(xlabel="epoch", ylabel="accuracy (%)", title=f"{config.algorithm} on MNIST, groups: {config.group}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower right")


def draw_mistakes(guesses: np.ndarray, data, out_dir: Path) -> None:
    """mistakes.png：測試集裡猜錯的前 40 張，猜的與真的；拼成一張大圖，比 40 個座標軸快得多。"""
    images, labels = np.asarray(data.images), np.asarray(data.labels)
    wrong = np.flatnonzero(guesses != labels)
    tiles, (height, width) = np.zeros((4, 10, 44, 38)), (44, 38)
    with figure(out_dir / "mistakes.png", figsize=(10, 4.9), layout="none") as (canvas, axes):
        canvas.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.9)
        for i, (row, column) in zip(wrong, np.ndindex(4, 10), strict=False):
            tiles[row, column, 16:, 5:33] = images[i].reshape(28, 28)
            x, y = column * width + 19, row * height + 15
            axes.text(x, y, f"guess {guesses[i]}\ntruth {labels[i]}", ha="center", va="bottom", fontsize=9)
        axes.imshow(tiles.swapaxes(1, 2).reshape(4 * height, 10 * width), cmap="gray_r", vmin=0, vmax=255)
        axes.axis("off")
        shown = f"; the first {min(len(wrong), 40)}" if len(wrong) else ""
        canvas.suptitle(f"{len(wrong)} of {len(labels):,} test images are wrong{shown}")


# 比較 ------------------------------------------------------------------------------------------------


def variants(config) -> dict:
    """--compare 要跑的設定；batch_… 是筆記的群組：一張圖片一個答案，整批互相比較。"""
    supervised = {"algorithm": "supervised", "group_size": 1, "train_epochs": 1}
    supervised |= {"clip_epsilon": type(config).clip_epsilon, "beta": 0.0}
    changes = {
        "notes": NOTES_SETTINGS,
        "default": {},
        "image_4": {"group": "image", "group_size": 4},
        "image_16": {"group": "image", "group_size": 16},
        "ppo": {"algorithm": "ppo"},
        "supervised": supervised,
        # 一批只學一遍，所以輪數乘上 K：更新次數和 default 一樣
        "supervised_equal": supervised | {"num_epochs": config.num_epochs * config.train_epochs},
        **{f"batch_{size}": {"batch_size": size, "group_size": 1} for size in BATCH_SIZES},
    }
    return {name: derive(name, config, **changed) for name, changed in changes.items()}


@nnx.jit
def label_log_probs(actor, images: jax.Array, labels: jax.Array) -> jax.Array:
    """每張圖片答對的機率取對數，log π(標籤 | 圖片)，(N,)；圖片是 uint8。"""
    return actor(images / 255).log_prob(labels)


def baseline_spreads(actor, data, seed: int) -> dict:
    """固定的策略、一張圖片一個答案：批次的平均獎勵抖動多大，旁邊是公式 √(p(1 - p) / B)。"""
    rng = np.random.default_rng(seed)
    correct = np.exp(label_log_probs(actor, data.images, data.labels))
    p, spreads = float(correct.mean()), {}
    for size in BATCH_SIZES:
        images = rng.integers(len(correct), size=(SPREAD_BATCHES, size))
        rewards = rng.random((SPREAD_BATCHES, size)) < correct[images]
        spreads[f"batch_{size}"] = [float(rewards.mean(axis=1).std()), math.sqrt(p * (1 - p) / size)]
    return spreads


def compare(run, config, train, data) -> None:
    def measure(name: str, variant) -> dict:
        result = train(variant, data, run.stop, progress=False)
        if result.interrupted:
            return {}
        measured = {**columns(result.history), "epoch_seconds": result.epoch_seconds}
        measured["memory_bytes"] = memory_bytes(result.agent)
        if name == "notes":
            measured["spreads"] = baseline_spreads(result.agent.actor, data.train, variant.seed)
        return measured

    lesson_extras.compare(run, config, variants(config), measure, comparison_table, draw_comparison)


def std_weight(p, group_size: int) -> np.ndarray:
    """除以標準差之後，答對機率 p 的圖片在期望的更新裡有多重，以 p = 0.5 為 1；不除是處處 1。

    k 個答對的一群，優勢是 √((G-k)/k) 與 -√(k/(G-k))，期望的更新是 ∇p 乘上 E[√(k(G-k))] / (G p(1-p))。
    """

    from scipy.stats import binom  # 匯入要半秒，只有這裡用

    def weight(p):
        k = np.arange(group_size + 1)
        counts = binom.pmf(k, group_size, np.asarray(p)[..., None])
        return counts @ np.sqrt(k * (group_size - k)) / (group_size * p * (1 - p))

    return weight(np.asarray(p)) / weight(np.array(0.5))


def last(row: dict, column: str) -> np.ndarray:
    """每個隨機種子最後一輪的數字。"""
    return np.array(row[column])[:, -1]


def against(row: dict, reference: dict) -> str:
    """測試集的準確率，同一個隨機種子減掉 reference 的；中斷時兩列的種子不一樣多，只減都有的。"""
    if row is reference:
        return "—"
    values, others = last(row, "test_accuracy"), last(reference, "test_accuracy")
    shared = min(len(values), len(others))
    return show_difference(values[:shared], others[:shared], "{:+.2f}")


def comparison_table(rows: dict) -> str:
    """三張 Markdown 表格：各種做法、訓練狀態的位元組、批次大小。"""
    methods, sizes, batches = [], [], []
    for name, row in rows.items():
        train_accuracy, test_accuracy = last(row, "train_accuracy"), last(row, "test_accuracy")
        reference = rows.get("batch_256" if name.startswith("batch_") else "default", row)  # 中斷時可能還沒有
        accuracies = [show_mean(train_accuracy, "{:.2f}"), show_mean(test_accuracy, "{:.2f}")]
        accuracies += [f"{test_accuracy.min():.2f}", against(row, reference)]
        seconds = f"{np.median(row['epoch_seconds']):.2f}"
        if name.startswith("batch_"):
            spreads = np.mean([spread[name] for spread in rows["notes"]["spreads"]], axis=0)
            size = int(name.removeprefix("batch_"))
            batches.append([f"{size:,}", *(f"{x:.4f}" for x in spreads), *accuracies, seconds])
            continue
        clip_fraction = np.mean(row["clip_fractions"], axis=1)
        shares = [show_mean(100 * x) for x in (last(row, "residuals"), last(row, "silent_shares"), clip_fraction)]
        if name.startswith("supervised"):  # 沒有優勢，也沒有比例
            shares = ["—"] * 3
        methods.append([f"`{name}`", *accuracies, *shares, seconds])
        if name in ("default", "ppo", "supervised"):
            states = [row["memory_bytes"][0][key] for key in STATE_NAMES]
            sizes.append([f"`{name}`", *(f"{size:,}" for size in (*states, sum(states)))])
    accuracy = ["訓練集，採樣 (%) [95 %]", "測試集，貪婪 (%) [95 %]", "測試集，最差的種子"]
    methods_header = ["做法", *accuracy, "測試集和 default 的差 [95 %]"]
    methods_header += ["基線沒解釋的 (%) [95 %]", "優勢是 0 的 (%) [95 %]", "最後一遍越界的 (%) [95 %]", "一輪的秒數"]
    batches_header = [*accuracy, "測試集和 B = 256 的差 [95 %]"]
    return "\n".join(
        [
            markdown_table(methods_header, methods),
            markdown_table(["訓練狀態 (位元組)", "參數", "梯度", "Adam 的動差", "合計"], sizes),
            markdown_table(["批次 B", "基線的標準差", "公式", *batches_header, "一輪的秒數"], batches),
        ]
    )


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：測試集的錯誤率，以及訓練狀態的大小；std_weights.png：除以標準差之後，難易不同的圖片各有多重。"""
    rows = lesson_extras.draw_whole(rows)
    with figure(out_dir / "comparison.png", 1, 2, figsize=(12, 4.6), width_ratios=[2, 1]) as (_, (left, right)):
        for i, name in enumerate(("notes", "default", "image_4", "image_16", "ppo", "supervised", "supervised_equal")):
            errors = 100 - np.array(rows[name]["test_accuracy"])
            count = errors.shape[1]  # supervised_equal 的輪數是 K 倍：畫在更新次數一樣的地方
            epochs = np.arange(1, count + 1) * len(rows["default"]["test_accuracy"][0]) / count
            label = f"{name}: {errors[:, -1].mean():.2f} %"
            draw_mean(left, epochs, errors, marker=".", color=f"C{i}", label=label)
        left.set(yscale="log", ylabel="greedy error on the test set (%)")
        left.set(xlabel="epoch (supervised_equal: at the same number of updates)")
        left.set_title(f"mean and 95 % interval, {len(rows['default']['test_accuracy'])} seeds")
        left.set_yticks([2, 3, 5, 10, 20, 50], labels=["2", "3", "5", "10", "20", "50"])
        left.minorticks_off()
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend(title="after the last epoch", loc="upper right", ncols=2, fontsize=9)
        for i, name in enumerate(("supervised", "default", "ppo")):
            left_edge = 0.0
            for j, (key, label) in enumerate(STATE_NAMES.items()):
                size = rows[name]["memory_bytes"][0][key] / 1e6
                right.barh(i, size, left=left_edge, color=f"C{j}", label=label if i == 0 else None)
                left_edge += size
        right.set_yticks(range(3), labels=("supervised", "GRPO, batch mean", "PPO"))
        right.set(xlabel="megabytes", title="training state", ylim=(-0.5, 3.3))
        right.legend(loc="upper right")
    p = np.linspace(0.005, 0.995, 199)
    with figure(out_dir / "std_weights.png", figsize=(6.5, 3.8)) as (_, axes):
        for i, size in enumerate((2, 4, 16)):
            axes.plot(p, std_weight(p, size), color=f"C{i}", label=f"G = {size}")
        axes.plot(p, 0.5 / np.sqrt(p * (1 - p)), color="0.5", linestyle="--", label="G → ∞: 1 / √(p(1 − p))")
        axes.set(xlabel="p: probability of a right answer", ylabel="weight of the image (p = 0.5 is 1)", ylim=(0.8, 5))
        axes.set_title("dividing by the group's standard deviation")
        axes.legend(loc="upper center")
