import itertools
import subprocess
import sys

import pytest

from armor.execution.fingerprint import code_hash

ROOTS = itertools.count()


@pytest.fixture
def project(tmp_path):
    """A stand-in package named armor: a.py imports core.b, unrelated.py stands alone."""
    package = tmp_path / "project" / "armor"
    for name, text in {
        "__init__": "",
        "core/__init__": "",
        "a": '"""A."""\nfrom armor.core.b import f\n\n\n@method("Title")\ndef g():\n    """Doc."""\n    return f()\n',
        "core/b": "import json\n\n\ndef f():\n    return 1\n",
        "unrelated": "x = 1\n",
    }.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (package / "core" / "page.html.j2").write_text("<p>")

    def edit(name, old, new):
        file = package / (name if "." in name else f"{name}.py")
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    def hashed():
        (root := tmp_path / str(next(ROOTS))).symlink_to(package.parent)  # hashes are kept by root
        return code_hash("armor.a", root=root)

    return edit, hashed


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("a", "return f()", "return f() + 1", True),
        ("core/b", "return 1", "return 2", True),
        ("core/page.html.j2", "<p>", "<div>", True),
        ("a", "Doc.", "Other words.", False),
        ("a", "return f()", "# a comment\n    return f( )", False),
        ("a", '"Title"', '"Another"', False),
        ("unrelated", "x = 1", "x = 2", False),
    ],
)
def test_the_hash_follows_what_is_executed(project, name, old, new, changes):
    edit, hashed = project
    before = hashed()
    edit(name, old, new)
    assert (hashed() != before) is changes


def test_the_stages_hashes_need_no_torch():
    code = "from armor.execution.fingerprint import code_hash; code_hash('armor.command.cli')"
    subprocess.run([sys.executable, "-c", f"import sys; {code}; assert 'torch' not in sys.modules"], check=True)
