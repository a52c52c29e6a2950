"""第 1 課跑完之後看的東西：印出來的表、三張圖、--compare。腳本把要用的函式傳進來，這裡不匯入腳本。

訓練不到一秒，所以三張圖自己排版 (subplots_adjust)，省下自動排版 (layout) 的半秒。
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle

import lesson_extras
from lesson_extras import draw_mean, figure, markdown_table, show_mean

ARROWS = "↑↓←→"
TIE = 1e-6  # Q 值差這麼少的動作算一樣好
COMPARE_POINTS = 40
PESSIMISTIC_Q = -200.0  # 比一直撞牆還差：撞牆的價值是 -1 / (1 - γ) = -100
EDGES = (((0, 0), (1, 0)), ((0, 1), (1, 1)), ((0, 0), (0, 1)), ((1, 0), (1, 1)))  # 一格的上、下、左、右邊


def best_actions(q_values: np.ndarray) -> np.ndarray:
    """一個狀態所有一樣好的最佳動作，例如起點的下與右。"""
    return np.flatnonzero(q_values >= q_values.max() - TIE)


def optimal_states(q_table: np.ndarray, q_star: np.ndarray) -> float:
    """貪婪動作真的是最佳動作的狀態，佔終點以外所有狀態的比率。"""
    chosen = np.take_along_axis(q_star, q_table.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float(np.mean((chosen >= q_star.max(axis=1) - TIE)[:-1]))


def describe(q_table: np.ndarray, size: int) -> str:
    """印給人看的結果：策略、價值、Q 表。"""
    goal = size * size - 1
    cells = ["".join(ARROWS[action] for action in best_actions(q_values)) for q_values in q_table]
    cells[goal] = "G"
    values = [f"{value:z.2f}" for value in q_table.max(axis=1)]
    lines = ["貪婪策略 (一樣好的動作都列出來；G 是終點)："]
    lines += ["".join(f"{cell:>7}" for cell in cells[first : first + size]) for first in range(0, goal, size)]
    lines += ["", "每個狀態的價值 V(s) = max Q(s, a)："]
    lines += ["".join(f"{value:>9}" for value in values[first : first + size]) for first in range(0, goal, size)]
    lines += ["", "Q 表 (一列一個狀態)：", "  狀態" + "".join(f"{arrow:>9}" for arrow in ARROWS)]
    lines += [f"{state:6}" + "".join(f"{q:z9.2f}" for q in q_values) for state, q_values in enumerate(q_table)]
    return "\n".join(lines) + "\n"


def draw(result, config, optimal_return: float, target_error: float, epsilon_at) -> None:
    draw_q_values(result, config)
    draw_value_spread(result, config)
    draw_learning_curve(result, config, optimal_return, target_error, epsilon_at)


def draw_q_values(result, config) -> None:
    """每一格切成四個三角形，顏色與數字是那個動作的 Q 值；中央的箭頭是最佳動作，平手的都畫。"""
    size, q_table = config.grid_size, result.q_table[:-1]
    middle, triangles = (q_table.min() + q_table.max()) / 2, []
    figsize = (1.5 * size + 1.4, 1.5 * size + 0.6)
    with figure(config.out_dir / "q_values.png", figsize=figsize, layout="none") as (canvas, axes):
        canvas.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.9)
        for (state, action), q in np.ndenumerate(q_table):
            row, column = divmod(state, size)
            corners = np.add([*EDGES[action], (0.5, 0.5)], (column, row))
            triangles.append(corners)
            x, y = (0.2 * corners[:2].mean(axis=0) + 0.8 * corners.mean(axis=0)).tolist()
            style = {"color": "black" if q > middle else "white", "fontsize": 8.5}
            axes.text(x, y, f"{q:z.1f}", ha="center", va="center", **style)
        for state, q_values in enumerate(q_table):
            arrows = "".join(ARROWS[action] for action in best_actions(q_values))
            circle = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "none"}
            axes.text(state % size + 0.5, state // size + 0.5, arrows, ha="center", va="center", size=11, bbox=circle)
        cells = PolyCollection(triangles, array=q_table.ravel(), cmap="cividis", edgecolors="white", linewidths=0.5)
        axes.add_collection(cells)
        for corner, label in ((0, "START"), (size - 1, "GOAL")):
            axes.add_patch(Rectangle((corner, corner), 1, 1, fill=False, lw=3, color="C1", clip_on=False))
            y = corner + (0.5 if corner else -0.06)
            axes.text(
                corner + 0.5, y, label, ha="center", va="center" if corner else "bottom", color="C1", weight="bold"
            )
        axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xticks=[], yticks=[])
        axes.set_title("Q(s, a) for each direction; arrows: best actions", pad=22)
        axes.spines[:].set_visible(False)
        canvas.colorbar(cells, label="Q(s, a)", shrink=0.8)


def draw_value_spread(result, config) -> None:
    """幾個回合之後每個狀態的價值，最右邊是精確解：價值從終點一格一格往回流。"""
    tables = {f"after episode {episode:,}": values for episode, values in result.spread.items()}
    tables["exact optimum"] = result.q_star.max(axis=1)
    size, low, high = config.grid_size, np.min([*tables.values()]), np.max([*tables.values()])
    width, height = 0.62 * size * len(tables), 0.62 * size + 0.3
    options = {"figsize": (width, height), "layout": "none", "squeeze": False}
    with figure(config.out_dir / "value_spread.png", 1, len(tables), **options) as (canvas, panels):
        canvas.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=1 - 0.32 / height, wspace=0.03)
        for axes, (title, values) in zip(panels[0], tables.items(), strict=True):
            shown = np.append(values[:-1], np.nan).reshape(size, size)  # 終點留白
            axes.imshow(shown, cmap="cividis", vmin=low, vmax=high)
            for state, value in enumerate(values):
                goal = {"color": "C1", "weight": "bold"} if state == size * size - 1 else {}
                style = goal or {"color": "black" if value > (low + high) / 2 else "white"}
                text = "GOAL" if goal else round(value)
                axes.text(state % size, state // size, text, ha="center", va="center", fontsize=9, **style)
            axes.set(title=title, xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.grid(False)


def draw_learning_curve(result, config, optimal_return: float, target_error: float, epsilon_at) -> None:
    """回報、ε、與 Q* 的差距，共用一條橫軸。"""
    options = {"figsize": (7, 6.4), "layout": "none", "sharex": True, "height_ratios": [3, 1.4, 2]}
    with figure(config.out_dir / "learning_curve.png", 3, 1, **options) as (canvas, (top, middle, bottom)):
        canvas.subplots_adjust(left=0.13, right=0.97, bottom=0.08, top=0.94, hspace=0.12)
        if result.curve:
            episodes, returns, errors = np.array(result.curve).T
            marker = "o" if len(episodes) == 1 else ""  # 一個點連不成線
            top.plot(episodes, returns, marker=marker, label="training episodes (ε-greedy), block mean")
            bottom.semilogy(episodes, np.maximum(errors, 1e-16), marker=marker, color="C3")
        top.axhline(optimal_return, color="C2", linestyle="--", label=f"best possible: {optimal_return:.0f}")
        top.set(ylabel="return", title=f"Q-learning on a {config.grid_size}×{config.grid_size} grid")
        top.legend()
        played = np.linspace(0, result.episodes, 401)
        middle.plot(played, [epsilon_at(episode, config) for episode in played], color="C1")
        middle.set(ylabel="ε", ylim=(-0.05, 1.05))
        bottom.axhline(target_error, color="0.4", linestyle=":", label=f"target: {target_error:.0e}")
        bottom.set(ylabel="max |Q − Q*|", xlabel="episode")
        bottom.yaxis.set_major_formatter("{x:.0e}")
        bottom.legend(loc="upper right")


# 比較 ------------------------------------------------------------------------------------------------


def variants(config) -> dict:
    """四種探索方式：config 的遞減，以及三種固定的 ε。各從兩張表開始：全是 0，與悲觀的初始值。"""
    explorations = {f"ε: {config.epsilon_start} → {config.epsilon_end}": config}
    explorations |= {f"ε = {e}": replace(config, epsilon_start=e, epsilon_end=e) for e in (0.01, 0.1, 1.0)}
    return {
        f"{name}, Q₀ = {q:g}": replace(exploration, compare=False, initial_q=q)
        for q in (0.0, PESSIMISTIC_Q)
        for name, exploration in explorations.items()
    }


def compare(run, config, train, evaluate) -> None:
    def measure(name: str, variant) -> dict:
        result = train(variant, run.stop, progress=False)
        if result.interrupted:
            return {}
        episodes, returns, errors = np.array(result.curve).T
        shown = np.unique(np.geomspace(1, len(episodes), COMPARE_POINTS).astype(int)) - 1  # 橫軸是對數
        return {
            "episodes": episodes[shown].tolist(),
            "returns": returns[shown].tolist(),
            "errors": errors[shown].tolist(),
            "mean_returns": float(np.average(returns, weights=np.diff(episodes, prepend=0))),  # 最後一段可能比較短
            "final_errors": float(errors[-1]),
            "greedy_returns": evaluate(result.q_table, variant),
            "optimal_states": optimal_states(result.q_table, result.q_star),
        }

    lesson_extras.compare(run, config, variants(config), measure, comparison_table, draw_comparison)


def comparison_table(rows: dict) -> str:
    """學習時付出的代價，與最後學到的東西。"""
    lines = []
    for name, row in rows.items():
        errors = row["final_errors"]
        cells = [show_mean(row["mean_returns"]), show_mean(row["greedy_returns"])]
        cells += [show_mean(100 * np.array(row["optimal_states"]), "{:.0f}")]
        lines.append([name, *cells, f"{np.median(errors):.1e}", f"{max(errors):.1e}"])
    header = (
        "探索方式",
        "學習時的平均回報",
        "最後的貪婪回報",
        "動作選對的狀態 (%)",
        "與 Q* 的最大差距：中位數",
        "最差的種子",
    )
    return markdown_table(header, lines)


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：學習時拿到的回報、離精確解多遠，以及從悲觀的表開始時的回報。"""
    rows = lesson_extras.draw_whole(rows)
    with figure(out_dir / "comparison.png", 1, 3, figsize=(15, 4.4)) as (_, panels):
        for i, (name, row) in enumerate(rows.items()):
            color, episodes, label = f"C{i % 4}", row["episodes"][0], name.split(", ")[0]
            style = {"color": color, "linestyle": ("-", "--", ":", "-.")[i % 4], "lw": 2.2, "label": label}
            draw_mean(panels[0 if i < 4 else 2], episodes, row["returns"], **style)
            if i < 4:
                errors = np.maximum(row["errors"], 1e-16)
                panels[1].plot(episodes, np.median(errors, axis=0), **style)
                panels[1].fill_between(episodes, errors.min(axis=0), errors.max(axis=0), color=color, alpha=0.2, lw=0)
        for axes in panels:
            axes.set(xlabel="episode", xscale="log", ylabel="return (mean of the seeds)")
            axes.xaxis.set_major_formatter("{x:,.0f}")
        panels[0].set_title("what learning costs")
        panels[1].set(title="what is learnt", ylabel="max |Q − Q*| (median, range)", yscale="log")
        panels[1].yaxis.set_major_formatter("{x:.0e}")
        panels[1].legend(loc="center right", fontsize=11)
        panels[2].set_title(f"what learning costs when the table starts at {PESSIMISTIC_Q:.0f}")
