import math
import re
from xml.etree import ElementTree

import pytest

from forge_jax.observe import charts
from forge_jax.observe.charts import Series


def texts(svg):
  return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_colours_are_variables_that_both_schemes_define():
  series = [Series(f"s{i}", [(0, i), (1, 1)], i) for i in range(4)]
  svg = charts.line_chart("all", series)
  assert not re.search(r"#[0-9a-f]{6}\b", svg)
  used = set(re.findall(r"var\(--([\w-]+)\)", svg))
  assert {f"series-{i}" for i in range(4)} <= used
  for name in used:
    assert charts.VARIABLES.count(f"--{name}:") == 2, name


def test_text_stays_text_and_one_line_needs_no_legend():
  one = Series("held-out", [(0, 0.36), (10, 1.0)], 0)
  assert "held-out" not in texts(charts.line_chart("a", [one], percent=True))
  both = charts.line_chart(
    "a", [one, Series("sampled", [(1, 0.5)], 1)], percent=True
  )
  assert {"held-out", "sampled", "step", "0%", "100%"} <= set(texts(both))


def test_ids_are_the_drawings_own():
  one = Series("s", [(0, 1.0), (1, 2.0)], 0)
  first, second = charts.line_chart("a", [one]), charts.line_chart("b", [one])
  ids = [set(re.findall(r'\bid="([^"]*)"', s)) for s in (first, second)]
  assert ids[0] and not ids[0] & ids[1]
  references = re.findall(r'(?:href="|url\()#([^")]*)', first)
  assert references and set(references) <= ids[0]


def test_drawings_are_repeatable():
  one = Series("s", [(0, 1.0), (1, 2.0)], 0)
  assert charts.line_chart("a", [one]) == charts.line_chart("a", [one])


def test_a_drawing_styles_nothing_else_and_names_no_address():
  svg = charts.line_chart("a", [Series("s", [(0, 1.0)], 0)])
  assert "<style" not in svg and "http" not in svg


@pytest.mark.parametrize(
  "points", [[], [(1, math.nan)], [(1, math.inf), (2, math.nan)]]
)
def test_nothing_to_draw(points):
  assert charts.line_chart("a", [Series("s", points, 0)]) is None


def test_a_logarithm_takes_positive_values_only():
  assert charts.line_chart("a", [Series("s", [(1, 0.0)], 0)], log=True) is None
  svg = charts.line_chart(
    "a", [Series("s", [(1, 0.0), (2, 3e-5), (3, 2e5)], 0)], log=True
  )
  assert svg.count("<use") == 2
  assert {"1e-4", "0.01", "1"} <= set(texts(svg))


def test_equal_values_have_a_logarithmic_axis():
  svg = charts.line_chart("a", [Series("s", [(1, 100.0)], 0)], log=True)
  assert {"100", "1000"} <= set(texts(svg))


def test_a_file_of_its_own_is_well_formed():
  svg = charts.line_chart("a", [Series("a < b & c", [(0, 1), (1, 2)], 0)])
  root = ElementTree.fromstring(charts.standalone(svg))
  assert root.tag == "{http://www.w3.org/2000/svg}svg"
  assert "prefers-color-scheme:dark" in root[0].text


def test_zeros_have_an_axis_that_begins_there():
  svg = charts.line_chart("a", [Series("s", [(1, 0.0), (2, 0.0)], 0)])
  assert {"0.0", "1.0"} <= set(texts(svg))
  assert not any("\N{MINUS SIGN}" in text for text in texts(svg))
