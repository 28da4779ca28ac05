"""configs/model/refined.yaml trains as a user starts it, at a tiny size: on one process, and on two tensor ranks."""

from pathlib import Path

import pytest

from maha_megatron.train.metrics import METRICS, read_rows
from tests.support.runs import corpus, pretrain  # noqa: F401 (a fixture)

TINY = """
extends: [model/refined]
run: {{name: refined, folder: {folder}/run}}
model: {{layers: 4, hidden: 32, heads: 4, kv_groups: 2, head_width: 8, ffn_hidden: 64, vocabulary: 512}}
maha: {{ratio: 2, windows: [8, 6, 32]}}
data: {{sequence_tokens: 128, train: [{{prefix: {corpus}/text_text_document}}], validation_frac: 0.1,
        tokenizer: {corpus}/tokenizer.model}}
schedule: {{kind: constant, peak: 1.0e-2, warmup_steps: 2}}
train: {{steps: 6, global_batch_samples: 4, micro_batch_samples: 2, precision: fp32, validation_interval_steps: 0,
         validation_samples: 4, log_interval_steps: 1}}
parallel: {{timeout_minutes: 2.0}}
checkpoint: {{interval_steps: 3}}
"""


@pytest.mark.full
def test_a_refined_model_trains_and_two_tensor_ranks_give_the_same_run(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(folder=tmp_path, corpus=corpus), encoding="utf-8")
    code, output = pretrain(config, extra=("--dry-run",))
    assert code == 0, output
    assert "model: 4 layers, 3 maha, 1 refined and 0 dense" in output
    code, output = pretrain(config)
    assert code == 0, output
    rows = read_rows(tmp_path / "run" / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["loss_nats"] < rows[0]["loss_nats"]
    refined = [rows[0][f"scale_weight/layer_03/{name}"] for name in ("scale_0", "scale_1", "scale_2", "opened")]
    assert sum(refined) == pytest.approx(1.0, abs=1e-5)
    assert min(refined) > 0
    assert "scale_weight/layer_02/opened" not in rows[0]
    code, output = pretrain(config, "train.steps=8")  # continues from the checkpoint
    assert code == 0, output
    assert "continuing after step" in output
    shared = ("parallel.tensor=2", "parallel.sequence=true", f"run.folder={tmp_path}/shared")
    code, output = pretrain(config, *shared, kind="torchrun", ranks=2)
    assert code == 0, output
    losses = [[row["loss_nats"] for row in read_rows(tmp_path / run / METRICS)][:6] for run in ("run", "shared")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
