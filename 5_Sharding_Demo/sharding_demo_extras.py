"""第 5 課跑完之後看的東西：量位元組、印出來的表、四種圖。腳本把結果傳進來，這裡不匯入腳本。"""

from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
import optax
from chips import collectives_table as collectives_table  # 測試與 benchmark.py 從這裡拿
from collectives import OPERATIONS, summarize
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ledger import ledger_table as ledger_table
from llama import WEIGHTS, Llama, count_activations, count_parameters
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from sharding_devices import FAKE_DEVICES
from traffic import table_cells

from lesson_extras import figure, markdown_table

MAX_NUMBERS = 2 * 10**9  # 八個假裝置擠在一台筆電裡，最多一共存幾個 float32：8 GB


def check_shape(config, llama: Llama) -> None:
    """模型的形狀合不合理，一台筆電放不放得下；不合就丟出 ValueError。"""
    if config.embed_dim % (2 * config.num_heads):
        right = f"每個頭分到的寬度要是偶數 (旋轉位置編碼成對旋轉)，所以要是 {2 * config.num_heads} 的倍數"
        raise ValueError(f"--embed-dim 是 {config.embed_dim}；{right}")
    if config.num_heads % config.num_kv_heads:
        right = f"每個鍵值頭服務一樣多的注意力頭，要整除 --num-heads {config.num_heads}"
        raise ValueError(f"--num-kv-heads 是 {config.num_kv_heads}；{right}")
    parameters = 4 * FAKE_DEVICES * count_parameters(llama)  # 權重、梯度、兩個動差，每個裝置一份
    activations = count_activations(llama, config.batch_size, config.sequence_length)
    if parameters + activations > MAX_NUMBERS:
        wrong = f"這樣的模型與批次要存的數太多 (權重的部分 {parameters:.0e} 個，中間結果 {activations:.0e} 個)"
        raise ValueError(f"{wrong}；一台筆電放得下 {MAX_NUMBERS:.0e} 個，把模型、批次或序列調小")


class Placed(NamedTuple):
    """一個權重怎麼放；從陣列讀出來，不是從規則算出來的。"""

    shape: tuple[int, ...]
    block: tuple[int, ...]  # 一個裝置上的形狀
    axes: tuple  # 每個維度切在哪個 Mesh 軸上


def measure(model: nnx.Module, optimizer: nnx.Optimizer, gradients) -> tuple[dict[str, int], dict[str, Placed]]:
    """訓練好的模型 → 一個裝置上的位元組，與每個權重怎麼放。"""
    moments = [optax.tree.get(optimizer.opt_state, name) for name in ("mu", "nu")]
    trees = {"parameters": nnx.state(model), "gradients": gradients, "moments": moments}
    weights = {path[-1]: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}
    placed = {
        name: Placed(array.shape, array.addressable_shards[0].data.shape, tuple(array.sharding.spec))
        for name, array in weights.items()
    }
    return {name: device_bytes(tree) for name, tree in trees.items()}, placed


def device_bytes(tree) -> int:
    """第一個裝置上實際放了多少位元組：量陣列的切片，不是算出來的。"""
    device = jax.local_devices()[0]
    shards = [shard for array in jax.tree.leaves(tree) for shard in array.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


# 表格 ------------------------------------------------------------------------------------------------


def difference(losses: list[float], reference: list[float]) -> np.ndarray:
    """每一步的損失與 reference 的相對差；只比兩邊都走到的步。"""
    steps = min(len(losses), len(reference))
    ours, theirs = np.array(losses[:steps]), np.array(reference[:steps])
    return np.abs(ours - theirs) / np.abs(theirs)


def metrics(results: dict) -> dict:
    """metrics.json 裡這一課自己的：每種策略一列 (strategies)，以及整個執行的三個數字。"""
    rows = {
        name: {
            "mesh": "x".join(map(str, result.program.mesh.devices.shape)),
            "rules": {axis: target for axis, target in result.program.rules.items() if target},
            "bytes": result.bytes,
            "collectives": summarize(result.collectives),
            "losses": result.losses,
            "test_loss": result.test_loss,
            "max_relative_difference": float(difference(result.losses, results["single"].losses).max()),
            "seconds_per_step": float(np.median(result.seconds)),
        }
        for name, result in results.items()
    }
    prompt, before, after = results["single"].samples
    last = [*rows.values()][-1]  # device_kb、collective_kb 是最後一種策略的
    return {
        "strategies": rows,
        "max_relative_difference": max(row["max_relative_difference"] for row in rows.values()),
        "device_kb": sum(last["bytes"].values()) / 1e3,
        "collective_kb": sum(collective["bytes"] for collective in last["collectives"]) / 1e3,
        "samples": {"prompt": prompt, "before": before, "after": after},
    }


def comparison_table(rows: dict[str, dict]) -> str:
    """Markdown 表格：一個裝置的位元組、集體通訊，與 single 的差。"""
    lines = []
    for name, row in rows.items():
        sizes = (f"{row['bytes'][key] / 1e3:,.1f}" for key in ("parameters", "gradients", "moments"))
        end = f"{1e3 * row['seconds_per_step']:.0f}", f"{row['max_relative_difference']:.1e}"
        lines.append([f"`{name}`", *sizes, *table_cells(row["collectives"]), *end])
    sizes = ("參數 (KB)", "梯度 (KB)", "Adam (KB)")
    return markdown_table(("策略", *sizes, "集體通訊：次數 (軸)", "通訊量 (KB)", "一步 (毫秒)", "最大相對差"), lines)


def show_target(target: str | tuple[str, ...] | None) -> str:
    """規則的目標，照 --rules 的寫法：data、data+model、None。"""
    return "+".join(target) if isinstance(target, tuple) else str(target)


def translation_table(placed: dict[str, Placed]) -> str:
    """每個權重：邏輯軸 → Mesh 軸 → 一個裝置上的形狀。"""
    lines = []
    for name, axes in WEIGHTS.items():
        spec = ", ".join(map(show_target, placed[name].axes))
        lines.append([name, ", ".join(axes), spec, str(placed[name].shape), str(placed[name].block)])
    return markdown_table(("權重", "邏輯軸", "PartitionSpec", "整個的形狀", "一個裝置上的形狀"), lines)


def gate_layer(result) -> tuple[tuple[int, int], NamedSharding]:
    """gate 的一層：形狀 (embed, mlp) 與切法。"""
    gate = result.weights["gate"]
    return gate.shape[1:], NamedSharding(result.program.mesh, PartitionSpec(*gate.axes[1:]))


def show(results: dict, metrics: dict) -> None:
    """在終端機印出每種策略的翻譯表，gate (第 0 層) 的每一塊在哪個裝置上，最後是比較。"""
    rows, samples = metrics["strategies"], metrics["samples"]
    for name, result in results.items():
        if name == "single":
            continue
        mesh, rules = result.program.mesh, {axis: show_target(to) for axis, to in rows[name]["rules"].items()}
        print(f"\n{name}：Mesh {dict(mesh.shape)}，規則 {rules}\n\n{translation_table(result.weights)}")
        if jax.process_count() == 1:  # 別的主機上的切片，這裡看不到
            print("gate[0]，直的是 embed，橫的是 mlp：")
            jax.debug.visualize_sharding(*gate_layer(result), use_color=False)
    test_losses = "、".join(f"{name} {row['test_loss']:.5f}" for name, row in rows.items())
    print(f"\n{comparison_table(rows)}\n沒看過的文字上的損失：{test_losses}")
    print(f"single 接著寫的字\n{samples_lines(samples)}")


def samples_lines(samples: dict[str, str]) -> str:
    """同一段沒看過的文字，訓練之前與之後接著寫的字。"""
    return f"　　提示：{samples['prompt']}\n訓練之前：{samples['before']}\n訓練之後：{samples['after']}"


def samples_text(samples: dict[str, str]) -> str:
    """README 裡的一段。"""
    return f"```text\n{samples_lines(samples)}\n```\n"


def remove_old(strategies: set[str], out_dir: Path) -> None:
    """這次沒有跑的策略，以前在同一個資料夾留下的圖與通訊：拿掉，免得和新的 metrics.json 混在一起。"""
    for name in strategies:
        (out_dir / f"placement_{name}.png").unlink(missing_ok=True)
        (out_dir / f"collectives_{name}.txt").unlink(missing_ok=True)


# 圖 --------------------------------------------------------------------------------------------------


def draw(results: dict, rows: dict[str, dict], out_dir: Path, target: float) -> None:
    draw_learning_curve(rows, out_dir, target)
    draw_bytes_and_collectives(rows, out_dir)
    for name, result in results.items():
        if name != "single":
            draw_placement(result, out_dir / f"placement_{name}.png")


def draw_learning_curve(rows: dict[str, dict], out_dir: Path, target: float) -> None:
    """上：每種策略的損失，疊在一起；下：與 single 的相對差。"""
    options = {"figsize": (7, 6), "layout": "none", "sharex": True, "height_ratios": [3, 2]}
    with figure(out_dir / "learning_curve.png", 2, 1, **options) as (canvas, (top, bottom)):
        canvas.subplots_adjust(left=0.14, right=0.97, bottom=0.08, top=0.94, hspace=0.08)
        for i, (name, row) in enumerate(rows.items()):
            steps = np.arange(1, len(row["losses"]) + 1)
            marker = "o" if len(steps) == 1 else ""  # 一個點連不成線
            top.plot(steps, row["losses"], marker=marker, color=f"C{i}", lw=9 - 1.5 * i, alpha=0.8, label=name)
            if name != "single":
                gap = np.maximum(difference(row["losses"], rows["single"]["losses"]), 1e-9)  # 0 畫不進對數座標
                bottom.plot(steps[: len(gap)], gap, ".-", color=f"C{i}")
        bottom.axhline(target, color="0.4", linestyle=":", label=f"target: {target:.0e}")
        top.set(ylabel="loss (nat per byte)", title="Same seed, same batches: the strategies agree")
        bottom.set(xlabel="step", ylabel="relative difference\n(0 drawn at 1e-9)", yscale="log", ylim=(5e-10, 1e-3))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        top.legend()
        bottom.legend()


def draw_bytes_and_collectives(rows: dict[str, dict], out_dir: Path) -> None:
    """左：一個裝置放多少；右：編譯器加了多少通訊。"""
    names = list(rows)
    options = {"figsize": (11, 4.2), "layout": "none", "sharey": True}
    with figure(out_dir / "bytes_and_collectives.png", 1, 2, **options) as (canvas, (left, right)):
        canvas.subplots_adjust(left=0.1, right=0.98, bottom=0.13, top=0.92, wspace=0.06)
        start = np.zeros(len(names))
        for i, kind in enumerate(("parameters", "gradients", "moments")):
            sizes = np.array([rows[name]["bytes"][kind] for name in names]) / 1e6
            left.barh(names, sizes, left=start, color=f"C{i}", label="Adam moments" if kind == "moments" else kind)
            start += sizes
        start = np.zeros(len(names))
        for i, operation in enumerate(OPERATIONS):
            calls = [[c for c in rows[name]["collectives"] if c["operation"] == operation] for name in names]
            sizes = np.array([sum(c["bytes"] for c in row) for row in calls]) / 1e6
            if sizes.any():
                right.barh(names, sizes, left=start, color=f"C{i}", label=operation)
            start += sizes
        counts = [sum(c["count"] for c in rows[name]["collectives"]) for name in names]
        for y, (name, end, count) in enumerate(zip(names, start, counts, strict=True)):
            text = f" {count} call{'' if count == 1 else 's'}"
            for c in rows[name]["collectives"]:  # 太短，畫出來看不到的，寫出來
                if c["bytes"] / 1e6 < start.max() / 100:
                    text += f"\n incl. {c['count']} {c['operation']}: {c['bytes'] / 1e6:.2f} MB"
            right.annotate(text, (end, y), va="center", fontsize=8)
        left.set(xlabel="MB on one device", title="What one device holds")
        right.set(xlabel="MB per device and step", title="What the compiler added: collectives")
        right.set_xlim(0, 1.25 * max(start.max(), 0.1))
        left.invert_yaxis()
        left.legend(fontsize=9)
        if any(counts):  # 只有 single 時沒有通訊
            right.legend(fontsize=9)


def draw_placement(result, path: Path) -> None:
    """哪個裝置放哪一塊：Mesh、一批文字、gate 的一層。一塊一個顏色，塊裡的數字是裝置在 Mesh 裡的位置。"""
    mesh, tokens = result.program.mesh, result.program.tokens
    position = {device: i for i, device in enumerate(mesh.devices.flat)}
    rows, columns = mesh.devices.shape
    panels = {("tokens", "batch", "sequence"): (tokens.shape, tokens.sharding)}
    panels["gate (one layer)", "embed", "mlp"] = gate_layer(result)
    options = {"figsize": (10, 3.4), "layout": "none", "width_ratios": [1, 2, 2]}
    with figure(path, 1, 3, **options) as (canvas, (chart, *others)):
        canvas.subplots_adjust(left=0.04, right=0.98, bottom=0.09, top=0.81, wspace=0.2)
        for i in range(mesh.devices.size):
            draw_block(chart, (i // columns, i // columns + 1), (i % columns, i % columns + 1), str(i), "0.9")
        chart.set(xlim=(0, columns), ylim=(rows, 0), xlabel=f"model ({columns})", ylabel=f"data ({rows})")
        chart.set_title("mesh")
        for axes, ((title, down, across), (shape, sharding)) in zip(others, panels.items(), strict=True):
            blocks: dict[tuple, list[int]] = {}
            for device, index in sharding.devices_indices_map(shape).items():
                bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
                blocks.setdefault(bounds, []).append(position[device])
            colors = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, len(blocks)))
            for color, (bounds, devices) in zip(colors, sorted(blocks.items()), strict=True):
                draw_block(axes, *bounds, " ".join(map(str, sorted(devices))), color)
            axes.set(xlim=(0, shape[1]), xlabel=f"{across} ({shape[1]})")
            axes.set(ylim=(shape[0], 0), ylabel=f"{down} ({shape[0]})")
            axes.set_title(f"{title}: {len(blocks)} block{'s' * (len(blocks) > 1)}")
        for axes in (chart, *others):
            axes.set(xticks=[], yticks=[])
        canvas.suptitle(f"{result.strategy}: numbers are positions in the mesh")


def draw_block(axes, rows: tuple[int, int], columns: tuple[int, int], text: str, color) -> None:
    (top, bottom), (left, right) = rows, columns
    patch = Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="black", alpha=0.45)
    axes.add_patch(patch)
    axes.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center")
