"""文件對照程式：連結、指令、超參數表與每一個結果數字。"""

import json
import re
import shlex
import shutil
from urllib.parse import unquote

import benchmark
import pytest
import tyro
from lessons import LESSONS, READMES, ROOT, block, config_table, defaults, load

SEEDS = list(benchmark.SEEDS)
READMES_BY_NAME = {str(path.relative_to(ROOT)): path for path in READMES}
SETUP_COMMANDS = (
    r"git clone \S+( \S+)?",
    r"cd \S+",
    r"python3 -m venv \.venv( && \.venv/bin/pip install -r requirements\.txt"
    r" && \.venv/bin/python 3_Pendulum/pendulum\.py)?",
    r"source \.venv/bin/activate",
    r"(\.venv/bin/)?pip install -r requirements\.txt",
    r"python3 -m venv \.venv-chips",
    r"\.venv-chips/bin/pip install (-r requirements\.txt|\"jax\[(cuda13|tpu)\]==[\d.]+\")",
    r"(\.venv/bin/)?pip install \"jax\[(cuda13|tpu)\]==[\d.]+\"",
    r"(\.venv/bin/python|python) -m pytest",
)


def text_of(readme: str) -> str:
    return READMES_BY_NAME[readme].read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """GitHub 替標題產生的錨點，加上手寫的 <a name="…">。"""
    slugs, seen = set(re.findall(r'<a (?:name|id)="([^"]+)"', text)), {}
    for title in re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE):
        title = re.sub(r"<[^>]+>|[`*]|\[([^\]]*)\]\([^)]*\)", lambda match: match[1] or "", title)
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        slugs.add(slug if seen[slug] == 0 else f"{slug}-{seen[slug]}")
    return slugs


@pytest.mark.parametrize("readme", READMES_BY_NAME)
def test_links_and_anchors_resolve(readme):
    text = without_code(text_of(readme))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert targets
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (READMES_BY_NAME[readme].parent / path).resolve() if path else READMES_BY_NAME[readme]
        assert file.exists(), f"{readme}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{readme}: {target}"


@pytest.mark.parametrize("readme", READMES_BY_NAME)
def test_formulas_render_on_github(readme):
    """緊貼中文的 $…$ GitHub 不認，行內要寫 $`…`$；反斜線後面接標點或空白會被 Markdown 吃掉。"""
    text = without_code(text_of(readme))
    formulas = re.findall(r"\$\$.*?\$\$|\$`[^`\n]+`\$", text, re.DOTALL)
    assert not [formula for formula in formulas if re.search(r"\\operatorname|\\[,;:!| ]", formula)]
    rest = re.sub(r"\$\$.*?\$\$|\$`[^`\n]+`\$|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "$" not in rest, f"{readme}: {rest[max(0, rest.index('$') - 30) : rest.index('$') + 30]}"


def commands(text: str) -> list[str]:
    """程式碼區塊裡的每一行，與句子、表格裡以 python 開頭的行內程式碼。"""
    lines = [line for code in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in code.splitlines()]
    lines += re.findall(r"`(python [^`\n]+)`", without_code(text))
    stripped = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return [line for line in stripped if line and not line.startswith("#")]


@pytest.mark.parametrize("readme", READMES_BY_NAME)
def test_every_command_parses(readme):
    assert commands(text_of(readme))
    for command in commands(text_of(readme)):
        if any(re.fullmatch(pattern, command) for pattern in SETUP_COMMANDS):
            continue
        program, path, *flags = shlex.split(command)
        assert program in ("python", ".venv/bin/python", ".venv-chips/bin/python"), command
        if path == "tests/benchmark.py":
            benchmark.make_parser().parse_args(flags)
            continue
        lesson = path.split("/")[0] if "/" in path else READMES_BY_NAME[readme].parent.name
        assert (ROOT / lesson / path.split("/")[-1]).is_file(), command
        tyro.cli(load(lesson).Config, args=flags)


def test_the_jax_page_runs_as_printed():
    scope, blocks = {}, re.findall(r"```python\n(.*?)```", block(text_of("README.md"), "jax"), re.DOTALL)
    assert len(blocks) == 6
    for code in blocks:
        exec(code, scope)
    assert scope["halved"]["kernel"].tolist() == [[0.5]] * 3
    assert scope["slope"] == pytest.approx(2 * ((2 * 5 - 1) * 5 + (2 - 1) * 1 + (2 * 2 - 1) * 2))
    assert scope["last"] == pytest.approx(1 + 0.9 + 0.81 + 0.729)
    assert scope["history"].tolist() == pytest.approx([0, 1, 1.9, 2.71])


NUMBER = r"(?<![\w.])[+-]?\d[\d,]*\.\d+(?:e[+-]\d+)?(?: %)?|(?<![\w.])\d+ %"


def test_every_number_of_the_notes_stands_in_a_lesson():
    """「跑跑看」與說法表裡的小數與百分比，都要在它連結的那一課的 README 裡；負號統一，連結與程式碼裡的不算。"""
    checked = 0
    for part in re.findall(r"(?:^>.*\n)+|^\|.*\n", text_of("README.md"), re.MULTILINE):
        linked = re.findall(r"\]\((\w+/README\.md)#", part)
        known = "".join(map(text_of, linked)).replace("−", "-").replace(",", "")
        for number in re.findall(NUMBER, re.sub(r"\]\([^)]*\)|`[^`]*`", "", part).replace("−", "-")) if linked else ():
            whole = "." not in number  # 表格的單位寫在欄名裡；整數短，至少要站在區間前面
            found = re.escape(number.replace(",", "").removesuffix(" %")) + (r"( %| \[)" if whole else "")
            found = rf"(?<![\d.]){found}(?!\d)"
            assert re.search(found, known), f"{number} is not in {linked}: {part}"
            checked += 1
    assert checked >= 40


@pytest.mark.parametrize("lesson", LESSONS)
def test_flags_named_in_the_text_exist(lesson):
    names = set(load(lesson).Config.__dataclass_fields__)
    for word in re.findall(r"`(--[a-z][a-z-]*)", without_code(text_of(f"{lesson}/README.md"))):
        name = word.removeprefix("--").replace("-", "_")
        assert name in names or name.removeprefix("no_") in names, f"{lesson}: {word}"


@pytest.mark.parametrize("lesson", LESSONS)
def test_config_table_equals_config(lesson):
    assert block(text_of(f"{lesson}/README.md"), "config") == config_table(lesson)


def recorded(lesson: str, name: str):
    return json.loads((ROOT / lesson / "figures" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("lesson", LESSONS)
def test_results_block_equals_the_recorded_runs(lesson):
    record = recorded(lesson, "results.json")
    assert record["defaults"] == defaults(lesson)
    assert [run["seed"] for run in record["runs"]] == SEEDS
    assert block(text_of(f"{lesson}/README.md"), "results") == benchmark.results_table(lesson, record)


def test_front_page_tables_equal_the_recorded_runs():
    assert block(text_of("README.md"), "lessons") == benchmark.lessons_table()
    assert block(text_of("README.md"), "evolution") == benchmark.evolution_table()


@pytest.mark.parametrize("lesson", LESSONS)
def test_comparison_block_equals_the_recorded_runs(lesson):
    record = recorded(lesson, "comparison.json")
    assert record["defaults"] == defaults(lesson)
    assert block(text_of(f"{lesson}/README.md"), "comparison") == load(lesson).extras.comparison_table(record["rows"])


def test_an_interrupted_comparison_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """已經存著的訓練不再做：改掉存著的一個數字、刪掉一次訓練，再跑一次，前者還在，後者補上。"""
    shared = load("1_Q_Learning").extras.lesson_extras
    flags = ["--compare", "--episodes", "30", "--decay-episodes", "10", "--out-dir", str(tmp_path)]
    comparisons, partial = [], tmp_path / "comparison.partial.json"
    for _ in range(2):
        monkeypatch.setattr(shared, "compare", shared.compare)
        monkeypatch.setattr(benchmark.sys, "argv", [])
        benchmark.run_and_remember("1_Q_Learning", str(partial), *flags)
        monkeypatch.undo()
        comparisons.append(json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["comparison"])
        record = json.loads(partial.read_text(encoding="utf-8"))
        first, *_, last = record["measured"]
        record["measured"][first]["greedy_returns"] = 12345
        del record["measured"][last]
        partial.write_text(json.dumps(record), encoding="utf-8")
    before, after = (next(iter(rows.values()))["greedy_returns"] for rows in comparisons)
    assert after[0] == 12345
    after[0] = before[0]
    assert comparisons[0] == comparisons[1]


@pytest.mark.parametrize("lesson", LESSONS)
def test_trials_block_equals_the_recorded_runs(lesson):
    rows, record = benchmark.trial_rows(lesson), recorded(lesson, "trials.json")
    assert record["defaults"] == defaults(lesson)
    assert {flags for _, flags in rows} == record["runs"].keys()
    for runs in record["runs"].values():
        assert [run["seed"] for run in runs] == SEEDS
    assert block(text_of(f"{lesson}/README.md"), "trials") == benchmark.trials_table(lesson, rows, record)


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_trial_parses(lesson):
    for _, flags in benchmark.trial_rows(lesson):
        tyro.cli(load(lesson).Config, args=flags.split())


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_committed_figure_is_shown(lesson):
    text = text_of(f"{lesson}/README.md")
    for figure in (ROOT / lesson / "figures").iterdir():
        assert figure.suffix == ".json" or f"figures/{figure.name}" in text, figure.name


def test_a_record_is_stale_when_what_measures_changes(monkeypatch, tmp_path):
    """量東西的程式變了，紀錄就過期；只改註解、畫圖或表格，不必重跑。"""
    folder = tmp_path / "2_Cart_Pole_DQN"
    shutil.copytree(ROOT / folder.name, folder, ignore=shutil.ignore_patterns("figures", "outputs", ".jax_cache"))
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    before = benchmark.code_digest(folder.name, extras=True)

    def changed(name: str, old: str, new: str) -> bool:
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        after = benchmark.code_digest(folder.name, extras=True)
        path.write_text(text, encoding="utf-8")
        return after != before

    assert not changed("cart_pole_dqn_extras.py", "does Q run away?", "does it?")
    assert not changed("lesson_extras.py", "duration=milliseconds", "duration=50")
    assert not changed("cart_pole_dqn.py", "# 8. 主程式", "# 主程式")
    assert changed("cart_pole_dqn_extras.py", "COMPARE_STEPS = 40_000", "COMPARE_STEPS = 50_000")
    assert changed("cart_pole_dqn_extras.py", '"eval_means": float(returns.mean())', '"eval_means": 0.0')
    assert changed("lesson_extras.py", "range(1000, 1010)", "range(10)")
    assert changed("cart_pole_dqn.py", "returns.mean()", "returns.max()")


def test_every_claim_has_its_evidence():
    """說法、判定、只改的一樣、數字與區間、種子、指令，一格都不空；十個種子的數字要有區間，沒有的要說。"""
    table = text_of("README.md").partition("## 每個說法都有一次執行")[2].partition("### 沒有驗的說法")[0]
    header, _, *rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header] == ["說法", "判定", "只改這一樣", "跑出來", "種子", "指令"]
    assert len(rows) >= 30
    for row in rows:
        claim, _, _, figures, seeds, _ = (cell.strip() for cell in row)
        assert all(cell.strip() for cell in row), claim
        assert "](" in figures, claim  # 數字在哪一節
        if seeds.startswith("10"):
            assert re.search(r"\[[-+−]?[\d.e+-]+, [-+−]?[\d.e+-]+\]", figures) or "沒有區間" in figures, claim
