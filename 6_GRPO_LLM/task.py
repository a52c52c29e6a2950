"""第 6 課的題目：三位數加三位數。題目怎麼寫、答案怎麼寫、怎麼判對錯，都只是規則，不用學。

347+286=633.                                直接作答
347+286=7+6=13,4+8+1=13,3+2+1=6,633.        逐步作答：從個位寫起，帶著進位；兩種都算對

預訓練的文字裡，逐步作答都是對的；直接作答的人只估個大概，很少剛好。
"""

import jax
import jax.numpy as jnp
import numpy as np
from axis_rules import distribute

CHARACTERS = "0123456789+=,._"  # 一個字元一個詞元；_ 是補到一樣長用的，不算答案
COMMA, STOP, PAD = (CHARACTERS.index(character) for character in ",._")
VOCAB = 16  # 多出來的一個沒有用到：2、4、8、16 個裝置都切得開
PROMPT_LENGTH = len("347+286=")
ANSWER_LENGTH = len("9+9=18,9+9+1=19,9+9+1=19,1998.")  # 最長的正確答案
SUM_LENGTH = len("1998.")  # 最長的直接答案
NUMBERS = 1_000  # 0 到 999
GUESS_ERROR = 50  # 預訓練的文字裡，直接作答離正確的和最多差多少
TEST_PROMPTS = 512  # 固定的題目，預訓練與 GRPO 都不用；其餘的都拿來學

LOOKUP = np.full(128, PAD, np.int32)
LOOKUP[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))


def encode(texts: list[str], length: int) -> np.ndarray:
    """文字 → 詞元 (N, length)，後面補 PAD。"""
    joined = "".join(text.ljust(length, "_") for text in texts)
    return LOOKUP[np.frombuffer(joined.encode(), np.uint8)].reshape(len(texts), length)


def decode(tokens: np.ndarray) -> str:
    """一列詞元 → 文字，去掉補上的；沒有用到的那個詞元寫成 ?。"""
    return "".join((CHARACTERS + "?")[token] for token in tokens).rstrip("_")


def prompt_text(a: int, b: int) -> str:
    return f"{a:03d}+{b:03d}="


def answer_text(a: int, b: int, step_by_step: bool, error: int = 0) -> str:
    """答案，句點結尾；error 不是 0 就差那麼多 (0 到 1998 之內)。"""
    steps, carry = "", 0
    for place in (1, 10, 100) if step_by_step else ():
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        steps += f"{x}+{y}{'+1' if carry else ''}={total},"
        carry = total // 10
    return f"{steps}{min(max(a + b + error, 0), 2 * NUMBERS - 2)}."


SUMS = encode([f"{total}." for total in range(2 * NUMBERS - 1)], SUM_LENGTH)  # 第 n 列是 n 寫成的詞元


def split_problems() -> tuple[np.ndarray, np.ndarray]:
    """一百萬個題目 a × 1000 + b，分成學習用的與測試用的；和隨機種子無關。"""
    problems = np.random.default_rng(0).permutation(NUMBERS**2)
    return problems[TEST_PROMPTS:], problems[:TEST_PROMPTS]


def make_prompts(problems: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """題目 (N,) → 提示的詞元 (N, PROMPT_LENGTH) 與和 (N,)。"""
    pairs = [divmod(problem, NUMBERS) for problem in problems.tolist()]
    sums = np.array([a + b for a, b in pairs], np.int32)
    return encode([prompt_text(a, b) for a, b in pairs], PROMPT_LENGTH), sums


def make_texts(problems: np.ndarray, step_by_step: bool, rng: np.random.Generator) -> np.ndarray:
    """題目 (N,) → 提示與答案的詞元；逐步作答是對的，直接作答是估的。直接作答短得多，不必補到一樣長。"""
    errors = rng.integers(-GUESS_ERROR, GUESS_ERROR, len(problems), endpoint=True) * (not step_by_step)
    rows = [
        (*divmod(problem, NUMBERS), error) for problem, error in zip(problems.tolist(), errors.tolist(), strict=True)
    ]
    texts = [prompt_text(a, b) + answer_text(a, b, step_by_step, error) for a, b, error in rows]
    return encode(texts, PROMPT_LENGTH + (ANSWER_LENGTH if step_by_step else SUM_LENGTH))


def answer_mask(answers: jax.Array) -> jax.Array:
    """答案裡哪些詞元算數：到第一個句點為止，含句點；沒寫完的全部都算。形狀同 answers，0 或 1。"""
    stops = jnp.cumsum(answers == STOP, axis=-1)
    return (stops - (answers == STOP) == 0).astype(jnp.float32)


def calculate_rewards(answers: jax.Array, sums: jax.Array, rule: str) -> jax.Array:
    """答案 (N, ANSWER_LENGTH) 與和 (N,) → 獎勵 (N,)，1 或 0；句點之後都要是 PAD。

    exact：最後一個逗號 (沒有就從頭) 之後，剛好是正確的和加句點。last-digit：只看句點前面那個字是不是正確的個位數。
    """
    if rule == "last-digit":
        stop = jnp.argmax(answers == STOP, axis=1, keepdims=True)  # 沒有句點就是 0
        before = jnp.take_along_axis(answers, jnp.maximum(stop - 1, 0), axis=1)[:, 0]
        return ((before == sums % 10) & (stop[:, 0] > 0)).astype(jnp.float32)
    positions = jnp.arange(ANSWER_LENGTH)
    start = jnp.max(jnp.where(answers == COMMA, positions + 1, 0), axis=1, keepdims=True)
    padded = jnp.pad(answers, ((0, 0), (0, SUM_LENGTH)), constant_values=PAD)
    written = jnp.take_along_axis(padded, start + jnp.arange(SUM_LENGTH), axis=1)
    return jnp.all(written == jnp.asarray(SUMS)[sums], axis=1).astype(jnp.float32)


class Problems:
    """題目從這裡來：學習用的與測試用的分開；同一個種子，次序相同。"""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.train, self.test = split_problems()

    def texts(self, steps: int, direct: int, step_by_step: int) -> tuple[jax.Array, ...]:
        """steps 批預訓練的文字：直接作答 (steps, direct, 13) 與逐步作答 (steps, step_by_step, 38)；沒有的就不給。"""
        kinds = []
        for rows, stepwise in ((direct, False), (step_by_step, True)):
            if rows:
                texts = make_texts(self.rng.choice(self.train, steps * rows), stepwise, self.rng)
                kinds.append(distribute(texts.reshape(steps, rows, -1), None, "batch", None))
        return tuple(kinds)

    def test_texts(self, direct: int, step_by_step: int) -> tuple[jax.Array, ...]:
        """同樣的文字，用測試題寫成：(direct, 13) 與 (step_by_step, 38)；沒有的就不給。"""
        parts = (self.test[:direct], False), (self.test[direct : direct + step_by_step], True)
        kinds = [make_texts(problems, stepwise, self.rng) for problems, stepwise in parts if len(problems)]
        return tuple(distribute(texts, "batch", None) for texts in kinds)

    def prompts(self, count: int) -> tuple[jax.Array, jax.Array]:
        """提示 (count, 8) 與正確的和 (count,)。"""
        prompts, sums = make_prompts(self.rng.choice(self.train, count))
        return distribute(prompts, "batch", None), distribute(sums, "batch")
