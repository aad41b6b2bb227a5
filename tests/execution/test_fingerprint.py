import shutil
import subprocess
import sys

import pytest

from tests.killed import REPOSITORY

PRINT = "from armor.execution.fingerprint import code_hash; print(code_hash('armor.a'))"


@pytest.fixture
def project(tmp_path):
    """A stand-in package named armor: a.py imports core.b, unrelated.py stands alone; it holds our fingerprint.py."""
    package = tmp_path / "armor"
    for name, text in {
        "__init__": "",
        "core/__init__": "",
        "a": '"""A."""\nfrom armor.core.b import f\n\n\n'
        '@method("Title", source="Someone", instead="h")\ndef g():\n    """Doc."""\n    return f()\n',
        "core/b": "import json\n\n\ndef f():\n    return 1\n",
        "unrelated": "x = 1\n",
    }.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (package / "core" / "page.html.j2").write_text("<p>")
    (package / "execution").mkdir()
    for name in ("core/errors.py", "execution/fingerprint.py"):
        shutil.copy(REPOSITORY / "armor" / name, package / name)

    def edit(name, old, new):
        file = package / (name if "." in name else f"{name}.py")
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    def code_hash():
        command = [sys.executable, "-c", PRINT]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout

    return edit, code_hash


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("a", "return f()", "return f() + 1", True),
        ("core/b", "return 1", "return 2", True),
        ("core/__init__", "", "y = 2\n", True),
        ("core/page.html.j2", "<p>", "<div>", True),
        ("a", "Doc.", "Other words.", False),
        ("a", "return f()", "# a comment\n    return f( )", False),
        ("a", '"Title"', '"Another"', False),
        ("a", '"Someone"', '"Nobody"', False),
        ("a", 'instead="h"', 'instead="i"', True),
        ("unrelated", "x = 1", "x = 2", False),
    ],
)
def test_the_hash_follows_what_is_executed(project, name, old, new, changes):
    edit, code_hash = project
    before = code_hash()
    edit(name, old, new)
    assert (code_hash() != before) is changes


def test_the_stages_hashes_need_no_torch():
    code = "from armor.execution.fingerprint import code_hash; code_hash('armor.command.cli')"
    subprocess.run([sys.executable, "-c", f"import sys; {code}; assert 'torch' not in sys.modules"], check=True)
