import io
import math

from rich import console as console_lib

from forge_jax.observe import display, metrics, names


def make(terminal, total=24, width=100):
  console = console_lib.Console(
    record=True, force_terminal=terminal, width=width, file=io.StringIO()
  )
  clock = [0.0]
  shown = display.LiveDisplay("demo [run]", total, console, lambda: clock[0])
  return shown, console, clock


def step(number, **extra):
  values = {
    names.TRAIN_REWARD: 0.1 * number,
    names.TRAIN_SUCCESS: 0.2 * number,
    names.TIME_STEP: 10.0,
    names.THROUGHPUT_ROLLOUT: 412.4,
    names.THROUGHPUT_TRAINING: 1530.0,
    names.THROUGHPUT_IO: 3.4e6,
    names.WEIGHTS_VERSION: number,
    names.MISMATCH_MAX: 3.1e-5,
  }
  return metrics.StepMetrics(number, 0.0, values | extra)


def panel_text(shown, console):
  console.export_text()  # clears what was recorded before
  console.print(shown.render())
  return console.export_text()


def test_the_panel_shows_every_figure():
  shown, console, clock = make(terminal=True)
  shown.observe(
    metrics.StepMetrics(
      0, 0.0, {names.EVAL_HELDOUT: 0.36, names.EVAL_PHRASINGS: 0.52}
    )
  )
  for number in (1, 2, 3):
    clock[0] += 30.0
    shown.observe(step(number))
  shown.update(
    {
      names.TREE_MERGE_RATIO: 5.94,
      names.TREE_POSSIBLE_RATIO: 6.2,
      names.TREE_FLOP_BOUND: 4.81,
      names.TREE_ACHIEVED: 0.93,
    }
  )
  shown.update(
    {
      names.QUEUE_HEAD: 17,
      names.QUEUE_IN_FLIGHT: 8,
      names.QUEUE_WAITING: 2,
    }
  )
  shown.note("a note [with brackets]")
  text = panel_text(shown, console)
  for part in (
    "demo [run]",
    "step 3/24",
    "+0.300",
    "60.0%",
    "▂▄▅",
    "rollout 412  training 1.5k  data -  I/O 3.4M",
    "head 17  in flight 8  complete, waiting 2",
    "version 3",
    "merged 5.9x of 6.2x  FLOPs saved 4.8x, 93.0% of it achieved",
    "max 3.1e-05",
    "1:30 elapsed, 3:30 left",
    "step 0: held-out 36.0%, unseen phrasings 52.0%",
    "a note [with brackets]",
  ):
    assert part in text, f"{part!r} is not in\n{text}"


def test_the_panel_shows_a_run_that_has_not_begun():
  shown, console, _ = make(terminal=True)
  text = panel_text(shown, console)
  assert "step 0/24" in text and "? left" in text
  assert "greedy" not in text


def test_the_panel_fits_a_narrow_terminal():
  shown, console, _ = make(terminal=True, width=60)
  shown.observe(step(1))
  assert max(map(len, panel_text(shown, console).splitlines())) <= 60


def test_the_first_and_the_newest_evaluations_stay():
  shown, console, _ = make(terminal=True)
  for number in range(0, 50, 10):
    event = {names.EVAL_HELDOUT: number / 100}
    shown.observe(metrics.StepMetrics(number, 0.0, event))
  text = panel_text(shown, console)
  assert "step 0: held-out 0.0%" in text
  assert "step 40: held-out 40.0%" in text
  assert "step 30:" in text and "step 10:" not in text


def test_evaluations_of_a_step_may_arrive_one_by_one():
  shown, console, _ = make(terminal=True)
  for name, share in ((names.EVAL_HELDOUT, 0.9), (names.EVAL_PHRASINGS, 0.8)):
    shown.observe(metrics.StepMetrics(4, 0.0, {name: share}))
  text = panel_text(shown, console)
  assert "step 4: held-out 90.0%, unseen phrasings 80.0%" in text


def test_the_terminal_is_redrawn_and_left_clean():
  shown, console, _ = make(terminal=True)
  with shown:
    shown.observe(step(2))
  text = console.file.getvalue()
  assert "step 2/24" in text
  assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor


def test_without_a_terminal_a_step_is_one_line():
  shown, console, clock = make(terminal=False, width=40)
  with shown:
    shown.observe(step(1))
    clock[0] = 12.0
    shown.update({names.QUEUE_HEAD: 3})
    shown.observe(step(2))
    shown.observe(metrics.StepMetrics(2, 0.0, {names.EVAL_HELDOUT: 0.9}))
    shown.note("saved [a]")
  lines = console.file.getvalue().splitlines()
  assert len(lines) == 4
  assert lines[0].startswith("step 1/24  reward +0.100  success 20.0%")
  assert lines[1].endswith("0:12 elapsed, 3:40 left")
  assert lines[2:] == ["  greedy  step 2: held-out 90.0%", "saved [a]"]
  assert "\x1b" not in console.file.getvalue()


def test_a_resumed_run_predicts_from_its_own_steps():
  shown, console, clock = make(terminal=True)
  event = metrics.StepMetrics(20, 0.0, {names.TRAIN_REWARD: 0.5})
  clock[0] = 15.0
  shown.observe(event)
  assert "0:15 elapsed, 1:00 left" in panel_text(shown, console)


def test_the_summary_compares_before_and_after():
  shown, console, _ = make(terminal=False)
  shown.summarize(
    {
      "heldout_before": 0.36,
      "heldout_after": 0.985,
      "phrasings_before": 0.52,
      "phrasings_after": None,
    }
  )
  rows = [line.split("│") for line in console.export_text().splitlines()]
  cells = [[c.strip() for c in row[1:-1]] for row in rows]
  assert ["held-out", "36.0%", "98.5%", "+62.5 points"] in cells
  assert ["unseen phrasings", "52.0%", "-", "-"] in cells


def test_sparkline():
  assert display.sparkline([0.0, 0.5, 1.0, math.nan, 2.0, -1.0], 9) == "▁▅█ █▁"
  assert display.sparkline([0.0, 1.0] * 50, 10) == "▅" * 10
  assert len(display.sparkline([0.3] * 33, 32)) == 32
  assert display.sparkline([], 5) == ""


def test_long_times_have_hours():
  shown, console, clock = make(terminal=True, total=1000)
  clock[0] = 3725.4
  shown.observe(step(1))
  assert "1:02:05 elapsed, 2:46:30 left" in panel_text(shown, console)
