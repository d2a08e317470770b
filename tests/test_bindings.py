"""tools/apk/bindings.py: the view binding classes that our build generates in place of the Android Gradle plugin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.checkpoints import ROOT

RESOURCES = ROOT / "android_demo" / "app" / "src" / "main" / "res"
SOURCES = ROOT / "android_demo" / "app" / "src" / "main" / "kotlin"
XMLNS = 'xmlns:android="http://schemas.android.com/apk/res/android" xmlns:tools="http://schemas.android.com/tools"'


def layout(folder: Path, inner: str, root: str = "LinearLayout", attributes: str = "") -> Path:
    """A resource folder with one layout, `two_words.xml`."""
    path = folder / "layout" / "two_words.xml"
    path.parent.mkdir(parents=True)
    path.write_text(f"<{root} {XMLNS} {attributes}>{inner}</{root}>", encoding="utf-8")
    return folder


def generated(resources: Path, out: Path) -> dict[str, str]:
    """Class name -> Java source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools" / "apk")
        from bindings import write_bindings

    write_bindings(resources, "com.example.app", out)
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(out.rglob("*.java"))}


def test_a_class_has_the_root_and_a_field_for_each_id(tmp_path: Path) -> None:
    inner = '<com.example.Fancy android:id="@+id/import_model"><TextView android:id="@+id/status" /><TextView />'
    inner += "</com.example.Fancy>"
    sources = generated(layout(tmp_path / "res", inner, root="ScrollView"), tmp_path / "out")
    (source,) = sources.values()
    assert list(sources) == ["TwoWordsBinding"]
    assert (tmp_path / "out/com/example/app/databinding/TwoWordsBinding.java").is_file()
    assert source.startswith("package com.example.app.databinding;")
    assert re.findall(r"public final ([\w.]+) (\w+);", source) == [
        ("com.example.Fancy", "importModel"),
        ("android.widget.TextView", "status"),
    ]
    assert "importModel = find(rootView, R.id.import_model);" in source
    methods = re.findall(r"public (?:static )?([\w.]+ \w+\(.*?\)) \{", source)
    assert [method.replace("@NonNull ", "").replace("@Nullable ", "") for method in methods] == [
        "android.widget.ScrollView getRoot()",
        "TwoWordsBinding inflate(LayoutInflater inflater)",
        "TwoWordsBinding inflate(LayoutInflater inflater, ViewGroup parent, boolean attachToParent)",
        "TwoWordsBinding bind(View rootView)",
    ]


@pytest.mark.parametrize(
    ("inner", "named"),
    [
        ('<include layout="@layout/other" />', "<include>"),
        ("<merge />", "<merge>"),
        ("<ViewStub />", "<ViewStub>"),
        ("<fragment />", "<fragment>"),
        ("<Button />", "<Button>"),
        ('<TextView android:id="@android:id/text1" />', "@android:id/text1"),
        ('<TextView android:id="@+id/a" /><TextView android:id="@+id/a" />', "@+id/a is there twice"),
        ('<TextView android:id="@+id/a_b" /><TextView android:id="@+id/aB" />', "two ids become one field"),
        ('<TextView tools:viewBindingType="View" />', "tools:viewBindingType"),
    ],
)
def test_what_is_not_known_is_refused_by_name(inner: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=re.escape(named)) as refused:
        generated(layout(tmp_path / "res", inner), tmp_path / "out")
    assert "two_words.xml" in str(refused.value)


def test_an_id_of_the_root_and_layouts_for_a_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="outermost view"):
        generated(layout(tmp_path / "a", "", attributes='android:id="@+id/root"'), tmp_path / "out")
    resources = layout(tmp_path / "b", "")
    (resources / "layout-land").mkdir()
    with pytest.raises(SystemExit, match="layout-land"):
        generated(resources, tmp_path / "out")


def test_the_app_uses_bindings_that_exist_and_no_find_view_by_id(tmp_path: Path) -> None:
    sources = generated(RESOURCES, tmp_path)
    kotlin = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCES.rglob("*.kt")))
    used = set(re.findall(r"databinding\.(\w+)$", kotlin, re.MULTILINE))
    assert used == sources.keys()
    assert "findViewById" not in kotlin
