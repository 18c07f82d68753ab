"""Reports hold all they show."""

import re

import numpy as np
from PIL import Image

from clipkit.core import Report, confusion_figure, curve_figure


def assert_refers_to_nothing_outside(text):
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import""", text)
    assert all((a or b).startswith("data:") for a, b in links), [link for link in links if not any(link)]
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text


def test_a_page_is_one_file_with_its_pictures(tmp_path):
    page = Report("Title <&>", "sub")
    page.heading("Loss", "a note")
    page.plot(curve_figure([1, 2, 3], [3.0, 2.0, 1.0], "x", "y", (2.5, "guessing")), "loss")
    page.plot(confusion_figure(np.array([[3, 1], [0, 4]]), ["a", "b"], "t"), "confusion")
    page.sheet([(Image.new("RGBA", (300, 200)), "<b>label</b>", True)])
    page.figures([("a", "1 %", "chance 0")])
    page.table([{"figure": "x", "value": 1}])
    page.code("clipkit --help")
    page.write(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert_refers_to_nothing_outside(text)
    assert text.count("data:image/png;base64,") == 3
    assert "Title &lt;&amp;&gt;" in text
    assert "<b>label</b>" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
