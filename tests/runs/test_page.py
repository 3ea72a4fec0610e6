"""The page of runs, opened by a browser; and what goes into it."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import make_dataset
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from e3_trl.commands import report
from e3_trl.runs import page as pages
from e3_trl.runs.page import PROMPT_ID, prompt_table, write_page
from e3_trl.runs.rollout_log import COLUMNS, RolloutLog, read_rollout_columns


NUM_PROMPTS = 10_000
NUM_PASSES = 3
# What each would do if it were taken for HTML: `broken` is the class of an element that is then there.
EVIL = '</script><script class="broken">alert(1)</script><img class="broken" src="x" onerror="alert(1)">&lt;'


def write_run(folder, correct, completions=(), settings=None, warnings=()):
    """The folder of a run that has seen prompts so often right in each pass, an array (P, passes), of 8 rollouts."""
    folder.mkdir()
    log = RolloutLog(folder)
    num_prompts, num_passes = correct.shape
    for number in range(num_passes):
        ids, rollouts = np.arange(num_prompts), np.full(num_prompts, 8)
        counts = {"prompt_id": ids, "rollouts": rollouts, "correct": correct[:, number], "tokens": 50 * rollouts}
        difficulty = np.full(num_prompts, np.nan if number == 0 else 0.25)
        log.append((number + 1, number, number), counts, difficulty, np.full(num_prompts, 1.5))
    history = [{"step": step, "epoch": step, "loss": 0.0, "reward": 0.1 * step} for step in range(1, num_passes + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": num_passes, "log_history": history}))
    settings = {"reward_funcs": "my_reward", "seed": 0, "output_dir": str(folder), **(settings or {})}
    (folder / "training_args.json").write_text(json.dumps(settings))
    (folder / "report.json").write_text(json.dumps({"settings": settings, "warnings": list(warnings)}))
    (folder / "completions").mkdir()
    for step in range(1, num_passes + 1):
        rows = [row for row in completions if row["step"] == step]
        if rows:
            pd.DataFrame(rows).to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
    return folder


def completion(step, prompt_id, text, reward, prompt="the question"):
    return {"step": step, PROMPT_ID: prompt_id, "prompt": prompt, "completion": text, "my_reward": reward}


@pytest.fixture(scope="module")
def opened(tmp_path_factory, browser):
    """The page of a run of 10,000 prompts: prompt 7 is newly solved, 8 lost, 9 never solved, others in all passes."""
    correct = np.full((NUM_PROMPTS, NUM_PASSES), 4)
    correct[7], correct[8], correct[9] = (0, 2, 8), (8, 2, 0), 0
    completions = [completion(1, 7, EVIL, 0.0, f"needle {EVIL}"), completion(1, 7, "x" * 5_000, 0.0)]
    completions += [completion(3, 7, "the right answer", 1.0), completion(3, 8, "a wrong answer", 0.0)]
    # Of an evaluation, and a value that is no number.
    completions += [completion(3, None, "never shown", 1.0), completion(2, 7, "unscored", np.nan)]
    warnings = [{"step": 2, "message": f"no group had rewards {EVIL}"}]
    folder = tmp_path_factory.mktemp("runs") / f"a run of {EVIL.replace('/', '')}"
    write_run(folder, correct, completions, {"beta": EVIL}, warnings)
    path = write_page([folder], folder / "report.html")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    return browser, path


def cells(browser, column):
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, f"#table tbody td:nth-child({column})")]


def search(browser, text):
    box = browser.find_element(By.CSS_SELECTOR, "#prompts input[type=search]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text or Keys.DELETE)


@pytest.fixture
def table(opened):
    """The page as it is when it is opened."""
    browser, _ = opened
    browser.refresh()
    return browser


def test_what_changed_comes_first_and_ten_thousand_prompts_are_quick(table):
    assert cells(table, 2)[:4] == ["7", "8", "9", "0"]
    assert cells(table, 4)[:4] == ["newly solved", "lost", "never solved", "solved still"]
    assert cells(table, 5)[0] == "0/8"
    assert cells(table, 6)[0] == "8/8"
    assert len(cells(table, 2)) == 25, "the others are not made yet"
    assert "10,000 prompts" in table.find_element(By.CSS_SELECTOR, ".dt-info").text
    seconds = table.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
    assert 0 < seconds < 10, "mostly under one, on a machine that is not busy"


def test_the_table_is_sorted_searched_and_filtered(table):
    (header,) = [th for th in table.find_elements(By.CSS_SELECTOR, "#table thead th") if th.text == "id"]
    header.click()
    assert cells(table, 2)[:3] == ["0", "1", "2"]
    header.click()
    assert cells(table, 2)[0] == str(NUM_PROMPTS - 1)
    search(table, "NEEDLE")
    assert cells(table, 2) == ["7"]
    search(table, "9998")
    assert cells(table, 2) == ["9998"]
    search(table, "")
    table.find_element(By.CSS_SELECTOR, ".chip.lost").click()
    assert cells(table, 2) == ["8"]
    assert "1 of 1 prompts (of 10,000)" in table.find_element(By.CSS_SELECTOR, ".dt-info").text


def test_a_prompt_is_opened_with_its_passes_and_completions_beside_each_other(table):
    assert table.find_elements(By.CSS_SELECTOR, ".details") == []
    row = table.find_element(By.CSS_SELECTOR, "#table tbody .opener")
    row.click()
    details = table.find_element(By.CSS_SELECTOR, ".details")
    lines = [line.text.split() for line in details.find_elements(By.CSS_SELECTOR, ".numbers tbody tr")]
    assert lines[0] == ["1", "8", "0", "0%", "50", "1.50"], "not ranked yet"
    assert lines[2] == ["3", "8", "8", "100%", "50", "0.25", "1.50"]
    passes = details.find_elements(By.CSS_SELECTOR, ".beside section")
    assert [one.find_element(By.TAG_NAME, "h5").text for one in passes] == ["Pass 1", "Pass 2", "Pass 3"]
    assert len({one.rect["y"] for one in passes}) == 1
    assert "✓ right\nthe right answer" in passes[2].text
    assert "3,500 characters are left out here" in passes[0].text
    assert "never shown" not in table.page_source
    row.click()
    assert table.find_elements(By.CSS_SELECTOR, ".details") == []


def test_what_data_model_and_names_say_is_text(table, opened):
    table.find_element(By.CSS_SELECTOR, "#table tbody .opener").click()
    assert table.find_elements(By.CSS_SELECTOR, ".broken") == []
    assert len(table.find_elements(By.TAG_NAME, "script")) == 4
    texts = [pre.text for pre in table.find_elements(By.CSS_SELECTOR, ".details pre")]
    assert EVIL in texts
    assert f"needle {EVIL}" in texts
    assert f"needle {EVIL}" in cells(table, 3)
    assert EVIL in table.find_element(By.CSS_SELECTOR, ".warnings").text
    table.find_element(By.TAG_NAME, "summary").click()
    assert EVIL in table.find_element(By.CSS_SELECTOR, "#settings table").text
    assert table.get_log("browser") == []


def test_it_loads_nothing_and_runs_nothing_else(table):
    loaded = table.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    images = table.find_elements(By.TAG_NAME, "img")
    assert images
    assert all(int(image.get_property("naturalWidth")) > 0 for image in images)
    table.execute_script(
        "const s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append(s)"
    )
    assert table.execute_script("return window.ran") is None
    assert "Content Security Policy" in table.get_log("browser")[0]["message"]


def test_of_several_runs_it_shows_the_settings_that_differ_and_the_prompts_of_each(tmp_path, browser):
    first = write_run(tmp_path / "a", np.array([[0, 1], [1, 1]]), settings={"beta": 0.0, "temperature": 1.0})
    second = write_run(tmp_path / "b", np.array([[1, 0], [1, 0]]), settings={"beta": 0.1, "temperature": 1.0})
    report.main([str(first), str(second), "--output", str(tmp_path / "both.html")])
    browser.get((tmp_path / "both.html").as_uri())
    lines = [line.text.split() for line in browser.find_elements(By.CSS_SELECTOR, "#settings tbody tr")]
    assert lines == [["beta", "0.0", "0.1"]]
    assert cells(browser, 4) == ["newly solved", "solved still"]
    browser.find_elements(By.CSS_SELECTOR, "#run option")[1].click()
    assert cells(browser, 4) == ["lost", "lost"]
    assert "No completions were logged" in browser.find_element(By.ID, "limits").text
    browser.execute_script("scrollTo(0, 0)")
    browser.find_element(By.CSS_SELECTOR, "a.tile.gained[data-run='0']").click()
    assert cells(browser, 4) == ["newly solved"]


def test_a_run_without_prompts_has_a_page(tmp_path):
    folder = write_run(tmp_path / "a", np.array([[0, 1]]))
    (folder / "rollouts.jsonl").unlink()
    html = write_page([folder], tmp_path / "report.html").read_text()
    assert "mean reward" in html
    assert 'id="table"' not in html
    with pytest.raises(SystemExit, match="nowhere is not there. Give run folders"):
        report.run(["nowhere"])


def columns_of(rows):
    names = ("prompt_id", "pass", "rollouts", "correct")
    frame = pd.DataFrame([dict.fromkeys(COLUMNS, 0) | dict(zip(names, row, strict=True)) for row in rows])
    return {name: frame[name].to_numpy() for name in frame}


def test_what_became_of_a_prompt():
    corrects = {1: (0, 0, 3), 2: (2, 0, 0), 3: (0, 0, 0), 4: (0, 1, 0), 5: (1, 0, 4), 6: (0, 0, 1)}
    rows = [(prompt, number, 4, right) for prompt, of in corrects.items() for number, right in enumerate(of)]
    rows += [(7, 1, 4, 1), (8, 2, 4, 0)]
    # A prompt can come more than once in a pass.
    rows += [(1, 2, 4, 1)]
    by_pass, table = prompt_table(columns_of(rows))
    expected = {1: "gained", 6: "gained", 2: "lost", 3: "never", 8: "never", 4: "between", 5: "kept", 7: "once"}
    assert table["change"].to_dict() == expected
    assert list(table.index) == list(expected), "what changed most comes first"
    assert by_pass.loc[(1, 2), ["rollouts", "correct"]].tolist() == [8, 4]
    assert table.loc[1, "difference"] == 0.5


def test_completions_are_of_prompts_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "COMPLETION_LIMITS", pages.COMPLETION_LIMITS | {"prompts": 3})
    correct = np.array([[0, 8]] * 4 + [[8, 0]] * 4 + [[0, 0]] * 4)
    completions = [completion(1, prompt, "a", 0.0) for prompt in range(12)]
    html = write_page([write_run(tmp_path / "a", correct, completions)], tmp_path / "report.html").read_text()
    (kept,) = re.findall(r'id="completions-0">(.*?)</script>', html)
    assert list(json.loads(kept)) == ["0", "4", "8"]


def test_long_runs_and_texts_are_cut_and_the_page_says_so(tmp_path, monkeypatch, browser):
    monkeypatch.setattr(pages, "MAX_PROMPTS", 2)
    monkeypatch.setattr(pages, "MAX_PASSES", 3)
    limits = {"prompts": 1, "passes": 2, "completions": 1, "characters": 10, "bytes": 2**20}
    monkeypatch.setattr(pages, "COMPLETION_LIMITS", limits)
    completions = [completion(step, prompt, f"{step}" * 20, 0.0) for step in range(1, 6) for prompt in (0, 0, 1)]
    folder = write_run(tmp_path / "a", np.array([[0, 1, 2, 3, 4]] * 3), completions)
    html = write_page([folder], tmp_path / "report.html").read_text()
    (rows,) = re.findall(r'id="rows-0">(.*?)</script>', html)
    rows = json.loads(rows)["rows"]
    assert len(rows["id"]) == 2
    assert [one[0] for one in rows["passes"][0]] == [1, 3, 5]
    (kept,) = re.findall(r'id="completions-0">(.*?)</script>', html)
    kept = json.loads(kept)
    assert list(kept) == ["0"]
    assert [(number, logged, len(some)) for number, logged, some in kept["0"]] == [(1, 2, 1), (5, 2, 1)]
    assert kept["0"][0][2][0][1] == "11111\n[10 characters are left out here]\n11111"
    browser.get((tmp_path / "report.html").as_uri())
    said = browser.find_element(By.ID, "limits").text
    assert "the 2 of 3 prompts that changed most" in said
    assert "Of more than 3 passes it shows so many" in said
    assert "Completions of 1 prompts" in said


@pytest.mark.parametrize("settings", [{}, {"rollout_allocation": "pilot"}], ids=str)
def test_logged_completions_say_which_prompt_they_are_of(make_trainer, settings):
    """Also where an evaluation comes between, whose rows TRL puts into the same table."""
    dataset = make_dataset()
    evaluated = {"eval_dataset": make_dataset(3), "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer = make_trainer(
        max_steps=3,
        log_completions=True,
        per_device_eval_batch_size=4,
        num_completions_to_print=1,
        **evaluated,
        **settings,
    )
    trainer.train()
    files = sorted((trainer.args.output_dir / pages.Path("completions")).glob("*.parquet"))
    assert len(files) == 4
    known = 0
    for file in files:
        for row in pd.read_parquet(file).to_dict("records"):
            if row[PROMPT_ID] is not None and not np.isnan(row[PROMPT_ID]):
                assert row["prompt"] == dataset[int(row[PROMPT_ID])]["prompt"]
                known += 1
    assert known >= 16 + 4
    trainer.save_state()
    table = read_rollout_columns(trainer.args.output_dir)
    described = pages._describe(pages.Run.read(trainer.args.output_dir), None)
    assert described["completions"]["of"]
    assert set(described["completions"]["of"]) <= set(table["prompt_id"].tolist())
