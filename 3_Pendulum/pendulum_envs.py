"""第 3 課的環境：許多份 Gymnasium 的 Pendulum-v1，一起走；以及評估用的起點。"""

import gymnasium as gym
import numpy as np

EPISODE_STEPS = gym.spec("Pendulum-v1").max_episode_steps  # 200


class PendulumEnvs:
    """num_envs 份 Pendulum-v1；起點是隨機的角度與角速度，每一份有自己的亂數，彼此獨立，也和別的 seed 獨立。

    Gymnasium 的物理是 NumPy 寫的：把狀態換成 (2, num_envs) 的陣列，同一個 step 就走完每一份，比一份一份走快好幾倍。
    沒有終止，每個回合都是 200 步，所以一起截斷；截斷的那一步就重置。

    states：下一步從哪裡走，觀測 (num_envs, 3)。
    finished：走完的回合的回報，一輪一個 (num_envs,)；第 i 輪 (從 0 算) 在第 (i + 1) × 200 × num_envs 步走完。
    """

    def __init__(self, num_envs: int, seed: int | list[int]):
        self.physics = gym.make("Pendulum-v1").unwrapped
        self.generators = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(num_envs)]
        self.finished = []
        self.start(self.random_starts())

    def random_starts(self) -> np.ndarray:
        """每份環境一個起點，形狀 (num_envs, 2)：角度 (rad)、角速度 (rad/s)；範圍和 Gymnasium 的 reset 相同。"""
        high = np.array([np.pi, 1.0])
        return np.array([generator.uniform(-high, high) for generator in self.generators])

    def start(self, starts: np.ndarray) -> None:
        """從 starts (num_envs, 2) 開始新的回合。"""
        self.physics.state = starts.T
        self.states = self.physics._get_obs().T
        self.steps, self.returns = 0, np.zeros(len(starts))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """力矩 (num_envs,) → 下一個觀測、獎勵、終止、截斷；回合的最後一步也是真正的觀測，重置後的起點只在 states。"""
        observations, rewards, *_ = self.physics.step(actions[None])
        next_states = self.states = observations.T
        self.steps += 1
        self.returns += rewards
        truncated = self.steps == EPISODE_STEPS
        if truncated:
            self.finished.append(self.returns)
            self.start(self.random_starts())
        return next_states, rewards, np.zeros(len(actions), bool), np.full(len(actions), truncated)


def evaluation_starts() -> np.ndarray:
    """評估用的起點，形狀 (100, 2)：角度 (rad)、角速度 (rad/s)。

    起點幾乎決定一個回合的回報，所以分層抽樣：角度 × 角速度切成 10 × 10 格，每格一個隨機點。
    產生器固定，所有隨機種子與演算法用同一組；訓練從不使用。
    """
    cells = np.stack(np.meshgrid(np.arange(10), np.arange(10), indexing="ij"), axis=-1).reshape(-1, 2)
    points = (cells + np.random.default_rng(0).uniform(size=cells.shape)) / 10
    return (2 * points - 1) * [np.pi, 1.0]
