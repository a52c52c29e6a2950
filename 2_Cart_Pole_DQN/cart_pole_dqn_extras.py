"""第 2 課跑完之後看的東西：圖、動畫、佔多少記憶體、--compare。腳本把要用的東西傳進來，這裡不匯入腳本。

預設執行的兩張圖自己排版 (subplots_adjust)，省下自動排版 (layout) 的時間。
"""

import os
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
from binned_table import BINS, train_table
from flax import nnx

import lesson_extras
from lesson_extras import (
    array_bytes,
    derive,
    draw_mean,
    figure,
    markdown_table,
    refuse_changed,
    save_gif,
    show_difference,
    show_mean,
)

EPISODE_STEPS = gym.spec("CartPole-v1").max_episode_steps  # 500，也是最高的回報
MOST_GIGABYTES = 4  # 一個學習階段最多用多少記憶體：一台筆電拿得出來的
COMPARE_STEPS = 40_000
FRAME_MILLISECONDS = 80  # 動畫每四步一張，一步 0.02 秒
SWITCHES = ("replay", "target_network", "double")
VARIANTS = {  # 名稱 (圖例與表格) → SWITCHES 的值
    "replay + target": (True, True, False),
    "no replay": (False, True, False),
    "no target": (True, False, False),
    "neither": (False, False, False),
    "double": (True, True, True),
}


# 設定能不能跑 ----------------------------------------------------------------------------------------


def check(config) -> None:
    """一個學習階段放不放得進記憶體；有 --compare 時，它要跑的每一種設定能不能跑。不行就丟出 ValueError。"""
    updates, hidden = config.updates_per_train, config.hidden_size
    batch = config.batch_size if config.replay else config.train_every // updates
    # 粗估：抽出來的經驗、一次更新的隱藏層、權重連同梯度與動差
    gigabytes = (100 * updates * batch + 30 * batch * hidden + 40 * hidden**2) / 1e9
    if gigabytes > MOST_GIGABYTES:
        flags = "--updates-per-train、--batch-size" if config.replay else "--train-every"
        right = f"要在 {MOST_GIGABYTES} GB 以下，把 {flags} 或 --hidden-size 調小"
        raise ValueError(f"一個學習階段大約要 {gigabytes:,.1f} GB 的記憶體；{right}")
    if config.compare:
        refuse_overridden(config)
        variants(config)


def refuse_overridden(config) -> None:
    """--compare 自己決定的旗標，不能也寫在命令列。"""
    refuse_changed(config, "--compare", (*SWITCHES, "watch"))
    if COMPARE_STEPS < config.total_steps != type(config).total_steps:
        wrong = f"--compare 配上 --total-steps {config.total_steps}"
        raise ValueError(f"{wrong}；--compare 最多走 {COMPARE_STEPS:,} 步，要在這以下")


def variants(config) -> dict:
    """VARIANTS 的每一種，走一樣多步、不提早停；每一種都檢查自己，不能跑就丟出 ValueError。"""
    steps = min(config.total_steps, COMPARE_STEPS)
    switches = {name: dict(zip(SWITCHES, values, strict=True)) for name, values in VARIANTS.items()}
    return {name: derive(name, config, early_stop=False, total_steps=steps, **on) for name, on in switches.items()}


# 訓練途中 --------------------------------------------------------------------------------------------


class History:
    """訓練途中量到的東西；每走過 every 的倍數一個點 (步數, 值)，站在量它的那一步。"""

    def __init__(self, every: int):
        self.every, self.step = every, 0
        self.curve = []  # 最近幾個訓練回合的平均回報
        self.checks = []  # 貪婪檢查的平均回報
        self.largest_q = []  # 上一個點以來最大的 |Q|
        self.recent_q = []  # 上一個點以來，每個學習階段最大的 |Q|

    def add_round(self, largest_q) -> None:
        """一個學習階段裡每次更新最大的 |Q|。"""
        self.recent_q.append(float(np.asarray(largest_q).max()))

    def add_point(self, step: int, mean_return: float, last: bool) -> None:
        """一個學習階段結束在第 step 步；last：訓練停在這裡，不是倍數也記。"""
        passed = step // self.every > self.step // self.every
        self.step = step
        if not (passed or last):
            return
        if not np.isnan(mean_return):
            self.curve.append((step, mean_return))
        if self.recent_q:
            self.largest_q.append((step, max(self.recent_q)))
        self.recent_q = []


def memory_bytes(agent, buffer) -> dict[str, int]:
    """訓練時要記住的東西，各佔幾個位元組。"""
    online, target = (array_bytes(nnx.state(net, nnx.Param)) for net in (agent.online_network, agent.target_network))
    moments = array_bytes(nnx.state(agent.optimizer))
    return {"parameters": online + target, "gradients": online, "moments": moments, "data": array_bytes(buffer.data)}


# 看它玩 ----------------------------------------------------------------------------------------------


def play(agent, render_mode: str) -> list[np.ndarray]:
    """不探索，玩一個回合；回傳每四步一張的畫面 (rgb_array)。"""
    no_window = {"SDL_VIDEODRIVER": "dummy"} if render_mode == "rgb_array" else {}  # 請 SDL 不要找螢幕
    env, q_function = gym.make("CartPole-v1", render_mode=render_mode), agent.q_function()
    state, _ = env.reset(seed=0)
    frames, step, done = [], 0, False
    with mock.patch.dict(os.environ, no_window):
        while not done:
            if step % 4 == 0:
                frames.append(env.render())
            state, _, terminated, truncated, _ = env.step(int(np.asarray(q_function(state[None])).argmax()))
            step, done = step + 1, terminated or truncated
        frames.append(env.render())
        env.close()
    # 軌道是一條一個像素寬的線，在奇數列；save_gif 隔列取樣，去掉最上面一列才留得住它
    return [frame[1:] for frame in frames if frame is not None]


# 圖 --------------------------------------------------------------------------------------------------


def draw(result, config, returns: np.ndarray, target_return: float, recent_episodes: int) -> None:
    draw_learning_curve(result.history, config, returns, target_return, recent_episodes)
    draw_q_values(result.agent, config.out_dir / "q_values.png")
    save_gif(config.out_dir / "agent.gif", play(result.agent, "rgb_array"), FRAME_MILLISECONDS)


def draw_learning_curve(history, config, returns: np.ndarray, target_return: float, recent_episodes: int) -> None:
    with figure(config.out_dir / "learning_curve.png", figsize=(7, 4), layout="none") as (canvas, axes):
        canvas.subplots_adjust(left=0.1, right=0.98, bottom=0.12, top=0.92)
        if history.curve:
            marker = "o" if len(history.curve) == 1 else ""  # 一個點連不成線
            label = f"training, mean of last {recent_episodes} episodes"
            axes.plot(*zip(*history.curve, strict=True), marker=marker, label=label)
        if history.checks:
            label = f"greedy check, {len(returns)} episodes"
            axes.plot(*zip(*history.checks, strict=True), "o", color="C1", label=label)
        label = f"final evaluation, greedy: {returns.mean():.1f}"
        axes.axhline(returns.mean(), color="C2", linestyle="--", label=label)
        axes.axhline(target_return, color="0.4", linestyle=":", label=f"target: {target_return:.0f}")
        axes.set(xlabel="environment steps", ylabel="mean return", title="DQN on CartPole-v1", ylim=(0, 520))
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9))


def draw_q_values(agent, path: Path) -> None:
    """小車靜止在中央，桿子的角度換 100 個值，角速度換 80 個值：左圖 max Q，右圖兩個動作的 Q 值差。"""
    angles, speeds = np.linspace(-12, 12, 100), np.linspace(-2, 2, 80)
    states = np.zeros((80, 100, 4), np.float32)
    states[..., 2], states[..., 3] = np.meshgrid(np.radians(angles), speeds)
    q_function = agent.q_function()
    q = np.stack([q_function(row) for row in states])  # 一次 100 個狀態，和評估一樣多，不必再編譯
    difference = q[..., 1] - q[..., 0]
    limit = float(np.abs(difference).max()) or 1.0
    image = {"origin": "lower", "extent": (-12, 12, -2, 2), "aspect": "auto"}
    with figure(path, 1, 2, figsize=(11, 4.4), layout="none") as (canvas, (left, right)):
        canvas.subplots_adjust(left=0.07, right=0.97, bottom=0.12, top=0.92, wspace=0.22)
        values = left.imshow(q.max(axis=-1), cmap="viridis", **image)
        canvas.colorbar(values, ax=left, label="max Q (discounted return)")
        gaps = right.imshow(difference, cmap="PuOr", vmin=-limit, vmax=limit, **image)
        canvas.colorbar(gaps, ax=right, label="Q(push right) − Q(push left)")
        left.set_title("how good is the state: max Q")
        right.set_title("which action is better")
        for axes in (left, right):
            axes.set(xlabel="pole angle (degrees, + = leaning right)", ylabel="pole angular velocity (rad/s)")
            axes.grid(visible=False)
        if difference.min() < 0 < difference.max():
            right.contour(angles, speeds, difference, levels=[0], colors="black", linewidths=1.5)
        for label, region in (("push right", difference > 0), ("push left", difference < 0)):
            if region.mean() > 0.05:
                rows, columns = np.nonzero(region)
                box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none"}
                right.text(angles[columns].mean(), speeds[rows].mean(), label, ha="center", va="center", bbox=box)


# 比較 ------------------------------------------------------------------------------------------------


def discounted_return(returns: np.ndarray, gamma: float) -> np.ndarray:
    """每步獎勵是 1 的回合的折扣回報：倒下的是 1 + γ + … + γ^(n-1)；撐到時間上限的當作永遠不倒，1 / (1 - γ)。"""
    return np.where(returns >= EPISODE_STEPS, 1.0, 1 - gamma**returns) / (1 - gamma)


def compare(run, config, train, evaluate, eval_seed: int, collecting: tuple) -> None:
    """collecting 是腳本的 ReplayBuffer、Collector、next_batches：分格的表和網路用同一份程式收集資料。"""
    make_buffer, make_collector, next_batches = collecting

    def measure_table(bins: int, variant) -> dict:
        """同樣的設定，網路換成每個維度 bins 格的表：評估的平均回報，學過的格子佔多少。"""
        rng, buffer = np.random.default_rng([variant.seed, 1]), make_buffer(variant.buffer_size)
        table = train_table(bins, variant, buffer, make_collector(variant, rng), next_batches, rng, run.stop)
        returns, _ = evaluate(table, eval_seed + variant.seed)
        return {"eval_mean": float(returns.mean()), "learnt_share": table.learnt_share()}

    def measure(name: str, variant) -> dict:
        """一次訓練：曲線，交出去的策略的回報，它以為的價值 (max Q) 與真正的折扣回報。"""
        result = train(variant, run.stop, progress=False)
        if result.interrupted:
            return {}
        returns, start_q = evaluate(result.agent, eval_seed + variant.seed)
        untrained, _ = evaluate(type(result.agent)(variant), eval_seed + variant.seed)
        return {
            "curves": result.history.curve,
            "largest_q": result.history.largest_q,
            "eval_means": float(returns.mean()),
            "untrained": float(untrained.mean()),
            "start_q": float(start_q.mean()),
            "true_returns": float(discounted_return(returns, variant.gamma).mean()),
            "gamma": variant.gamma,
            **({"tables": [measure_table(bins, variant) for bins in BINS]} if name == "replay + target" else {}),
        }

    lesson_extras.compare(run, config, variants(config), measure, comparison_table, draw_comparison)


def comparison_table(rows: dict) -> str:
    """差是和第一列同一個種子相減；高估是起點的 max Q 減去同一批回合真正的折扣回報。最後是未訓練的網路與分格的表。"""
    lines, first = [], next(iter(rows.values()))
    for name, row in rows.items():
        training = [np.mean([value for _, value in curve]) for curve in row["curves"] if curve]
        largest = [max((value for _, value in curve), default=np.nan) for curve in row["largest_q"]]
        shared = min(len(row["eval_means"]), len(first["eval_means"]))  # 中斷時每一列的種子不一樣多
        difference = show_difference(row["eval_means"][:shared], first["eval_means"][:shared])
        cells = [
            f"`{name}`",
            show_mean(training) if training else "—",
            show_mean(row["eval_means"]),
            f"{min(row['eval_means']):.1f}",
        ]
        cells += ["—" if row is first else difference, f"{np.median(largest):.0f}", f"{max(largest):.0f}"]
        over = np.subtract(row["start_q"], row["true_returns"])
        lines.append([*cells, show_mean(row["true_returns"]), show_mean(over, "{:+.1f}")])
    untrained = first["untrained"]
    lines.append(["未訓練", "—", show_mean(untrained), f"{min(untrained):.1f}", *["—"] * 5])
    for bins, tables in zip(BINS, zip(*first["tables"], strict=True), strict=True):
        returns, shares = [[table[key] for table in tables] for key in ("eval_mean", "learnt_share")]
        cells = [f"表，{bins**4:,} 格，學過 {show_mean(shares, '{:.1%}')}", "—"]
        cells += [show_mean(returns), f"{min(returns):.1f}"]
        lines.append([*cells, show_difference(returns, first["eval_means"]), *["—"] * 4])
    header = ["組合", "訓練期間的平均回報 [95 %]", "最後的貪婪策略：平均 [95 %]", "最差的種子", "差 [95 %]"]
    header += ["最大的 \\|Q\\|：中位數", "最大值", "真正的折扣回報 [95 %]", "起點高估 [95 %]"]
    return markdown_table(header, lines)


def draw_curves(axes, label: str, curves: list, color: str) -> None:
    """每條曲線的點不在同樣的步數，先內插到共同的步數。"""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    steps = np.linspace(first, last, min(map(len, curves)))
    values = np.array([np.interp(steps, *zip(*curve, strict=True)) for curve in curves])
    draw_mean(axes, steps, values, label=label, color=color)
    axes.set(xlabel="environment steps", ylabel="mean return of training episodes")


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：左邊學習曲線，右邊最大的 |Q|；穩定器的四種組合。"""
    rows = lesson_extras.draw_whole(rows)
    with figure(out_dir / "comparison.png", 1, 2, figsize=(12, 4.6)) as (_, (left, right)):
        for i, name in enumerate(name for name in rows if name != "double"):
            for axes, column in ((left, "curves"), (right, "largest_q")):
                if all(rows[name][column]):
                    draw_curves(axes, name, rows[name][column], f"C{i}")
        untrained = np.mean(rows["replay + target"]["untrained"])
        left.axhline(untrained, color="0.4", linestyle=":", label=f"untrained: {untrained:.1f}")
        bound = 1 / (1 - rows["replay + target"]["gamma"][0])
        right.axhline(bound, color="black", linestyle="--", label=f"1 / (1 − γ) = {bound:.0f}: no true value is larger")
        right.set(yscale="log", ylabel="largest |Q| in training")
        left.set_title(f"CartPole-v1: mean and 95 % interval, {len(rows['replay + target']['curves'])} seeds")
        right.set_title("does Q run away?")
        if left.lines:  # 走得太少，一個點都沒有時，沒有圖例
            left.legend(loc="upper left", fontsize=9)
        right.legend(loc="lower right", fontsize=9)
