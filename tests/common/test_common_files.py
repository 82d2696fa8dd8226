"""common/files.py: a folder appears whole or not at all, and nobody else's goes with what a kill left of one."""

import json
import os
import shutil

import pytest
from saving import killed_before

from common.config import ConfigError, ending
from common.files import MARK, REPORT_MARK, is_ours, make_folder, new_folder, refuse_foreign, signed
from common.plots import new_figure, png
from dataset.formats import OURS


def fill(out, text, overwrite=True):
    with new_folder(out, overwrite, ["file"]) as folder:
        (folder / "file").write_text(text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_what_a_kill_leaves_of_a_new_folder_is_put_right_by_the_next(tmp_path):
    mine = [".out.0123abcd.new", ".out.0123abcd.old", ".out.notes.new"]
    killed, found = True, []
    while killed:
        parent = tmp_path / str(len(found))
        fill(parent / "out", "old")
        for name in mine:
            (parent / name).mkdir()
            (parent / name / "thesis.txt").write_text("mine")
        events = {"os.mkdir", "os.rename", "os.rmdir", "open"}
        killed = killed_before(len(found), lambda out=parent / "out": fill(out, "new"), events, "out")
        with pytest.raises(ConfigError, match="out exists: give --overwrite"):
            fill(parent / "out", "third", overwrite=False)
        found.append((parent / "out" / "file").read_text())
        assert sorted(os.listdir(parent)) == [*mine, "out"]
        assert all((parent / name / "thesis.txt").read_text() == "mine" for name in mine)
        fill(parent / "out", "third")
        assert (parent / "out" / "file").read_text() == "third" and len(os.listdir(parent / "out")) == 2
        shutil.rmtree(parent)
    assert sorted(set(found)) == ["new", "old"] and found == sorted(found, reverse=True)


@pytest.mark.parametrize("listed", [{}, {"file": None}, {"file": None, "gone": 3}, 3])
def test_what_a_mark_does_not_list_stays(tmp_path, listed):
    for kind in ("new", "old"):
        left = tmp_path / f".out.aaaaaaaa.{kind}"
        left.mkdir()
        for name in ("mine.txt", "file", f"file.1.{OURS}"):
            (left / name).write_text("x")
        (left / MARK).write_text(json.dumps({"files": listed}))
        (tmp_path / f".out.bbbbbbbb.{kind}").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text('{"files": {}}')
    fill(tmp_path / "out", "new")
    stays = {"mine.txt"} if isinstance(listed, dict) and listed else {"mine.txt", "file"}
    assert {path.name for path in (tmp_path / ".out.aaaaaaaa.new").iterdir()} == stays
    assert {path.name for path in (tmp_path / ".out.aaaaaaaa.old").iterdir()} >= {"mine.txt", "file", MARK}
    assert {path.name for path in tmp_path.iterdir()} == {
        "out",
        ".out.aaaaaaaa.new",
        ".out.aaaaaaaa.old",
        ".out.bbbbbbbb.old",
    }


def test_folders_in_which_nothing_came_to_stand_are_removed_at_the_end(tmp_path):
    (tmp_path / "there").mkdir()
    with ending:
        make_folder(tmp_path / "there" / "a" / "b")
        make_folder(tmp_path / "full" / "a" / "b")
        (tmp_path / "full" / "file").touch()
        make_folder(tmp_path / "there")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "there"]


def test_only_a_mark_in_its_place_makes_a_report_or_picture_ours(tmp_path):
    ours = png(new_figure(1, 1))
    report = signed("# report\n\n")
    old = f"# report\n\n{REPORT_MARK}\n".encode()
    for text in (report, report.replace(b"\n", b"\r\n"), signed(""), old, old.replace(b"\n", b"\r\n")):
        (tmp_path / "a.md").write_bytes(text)
        refuse_foreign(tmp_path / "a.md", ".md")
    (tmp_path / "a.png").write_bytes(ours)
    refuse_foreign(tmp_path / "a.png", ".png")
    foreign = ours.replace(OURS.encode(), b"X" * len(OURS))
    for name, data in (
        ("b.md", b""),
        ("b.md", f"# {OURS}\n".encode()),
        ("b.md", f"{REPORT_MARK}\n\nmine\n".encode()),
        ("b.md", f"A report ends in `{REPORT_MARK}`\n".encode()),
        ("b.png", b""),
        ("b.png", foreign + b"Software\0" + OURS.encode()),
        ("b.png", ours[8:]),
        ("b.png", foreign[:-4]),
        ("b.png", REPORT_MARK.encode()),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match="was not written by such a command"):
            refuse_foreign(tmp_path / name, "." + name[2:])


def test_a_place_where_no_file_can_be_made_is_told_at_once(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="r.md: .*notes.txt is no folder"):
        refuse_foreign(tmp_path / "notes.txt" / "r.md", ".md")
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="r.png: .*broken is no folder"):
        refuse_foreign(tmp_path / "broken" / "deeper" / "r.png", ".png")
    refuse_foreign(tmp_path / "new" / "deeper" / "r.md", ".md")
    assert not (tmp_path / "new").exists()


def test_a_report_with_a_users_words_is_not_replaced(tmp_path):
    path, report = tmp_path / "a.md", signed("# report\n\n| a | b |\n").decode()
    for text in (f"mine\n{report}", report.replace("report", "Report", 1), report.replace("\n\n", "\nmine\n", 1)):
        path.write_text(text, encoding="utf-8")
        assert is_ours(path)
        with pytest.raises(ConfigError, match="a.md was changed since it was written: choose another name, or remove"):
            refuse_foreign(path, ".md")
    path.write_text(report + "mine\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="a.md was not written by such a command"):
        refuse_foreign(path, ".md")
