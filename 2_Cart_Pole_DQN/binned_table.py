"""第 2 課的對照：環境、探索、回放、同步與步數都不變，網路與 Adam 換成一張分格的 Q 表。--compare 用它量泛化值多少。"""

import numpy as np

BINS = (4, 8, 16)  # 每個維度切成幾格；一共 256、4,096、65,536 格
ALPHA = 0.1  # 學習率；種子 0 到 9 上，0.1、0.3、1.0 裡它的三種格數平均最高
LIMITS = np.array([2.4, 3.0, 0.2095, 3.0])  # 切格子的範圍：位置、速度、角度、角速度；之外的算最外面的一格


class BinnedTable:
    """Q 表：一格一列，格子之間什麼都不共用。和 DQNAgent 一樣有 q_function，所以收集與評估是同一份程式。"""

    def __init__(self, bins: int):
        self.bins, self.q = bins, np.zeros((bins**4, 2))
        self.target = self.q.copy()

    def cells(self, states: np.ndarray) -> np.ndarray:
        """觀測 (..., 4) → 格子的編號 (...)。"""
        index = np.clip((states / LIMITS + 1) / 2 * self.bins, 0, self.bins - 1).astype(int)
        return np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), (self.bins,) * 4)

    def learnt_share(self) -> float:
        """學過的格子佔多少：獎勵都是 1，學過的格子一定不是 0。"""
        return float(self.q.any(axis=1).mean())

    def q_function(self):
        return lambda states: self.q[self.cells(states)]

    def learn(self, batch, gamma: float) -> None:
        """用一批經驗更新一次；同一格的同一個動作出現幾次，就往它們目標的平均走一步。"""
        next_q = self.target[self.cells(batch.next_state)]
        targets = batch.reward + gamma * (1 - batch.terminated) * next_q.max(axis=-1)
        entries, which, counts = np.unique(
            2 * self.cells(batch.state) + batch.action, return_inverse=True, return_counts=True
        )
        flat = self.q.reshape(-1)  # 同一塊記憶體
        flat[entries] += ALPHA * (np.bincount(which, targets) / counts - flat[entries])


def train_table(bins: int, config, buffer, collector, next_batches, rng, stop) -> BinnedTable:
    """和 cart_pole_dqn.py 的 train 一樣收集、抽樣、同步，更新一樣多次；stop 被設定時提早停。"""
    table, rounds = BinnedTable(bins), 0
    while buffer.added < config.total_steps and not stop.is_set():
        due = config.learning_starts + rounds * config.train_every
        collector.collect(table, buffer, min(due, config.total_steps))
        if buffer.added >= due:
            batches = next_batches(buffer, due, config, rng)
            for update in range(config.updates_per_train):
                table.learn(type(batches)(*(column[update] for column in batches)), config.gamma)
            rounds += 1
            if rounds % config.sync_every == 0:
                table.target = table.q.copy()
    collector.envs.close()
    return table
