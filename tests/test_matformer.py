"""Tables of MatFormer slices: the published form is read, and every mistake is told with its line."""

from __future__ import annotations

import pytest

from inferfleet.engine.errors import LoadError
from inferfleet.engine.loader import EngineSpec
from inferfleet.engine.matformer import SliceRow, read_table

COLUMNS = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped"


def published(factor: int, count: int) -> str:
    return '"[' + ", ".join([f"2_048 * {factor}"] * count) + ']"'


@pytest.fixture
def table(tmp_path):
    """table(*lines): the path of a CSV with the published columns and these lines."""

    def write(*lines: str, columns: str = COLUMNS) -> str:
        path = tmp_path / "slices.csv"
        path.write_text("\n".join([columns, *lines]) + "\n")
        return str(path)

    return write


def test_the_published_form_is_read(table):
    path = table(
        f"Main model,35,3.98,62.30%,{published(8, 35)},",
        f'Config for official E2B Model,30,1.91,50.90%,{published(4, 30)},"[20, 21, 22, 23, 24]"',
        "",
    )
    found = read_table(path, "Main model")
    assert found.rows == (
        SliceRow("Main model", (16_384,) * 35, frozenset()),
        SliceRow("Config for official E2B Model", (8192,) * 30, frozenset({20, 21, 22, 23, 24})),
    )
    assert (found.names[0], found.default) == ("Main model", "Main model")


@pytest.mark.parametrize(
    ("cell", "widths"),
    [
        ('"[8192, 4_096]"', (8192, 4096)),
        ('"[ 2048*4 ,2_048 * 2 * 2 ]"', (8192, 8192)),
        ("[16]", (16,)),
    ],
)
def test_widths_are_whole_numbers_or_products_of_them(table, cell, widths):
    assert read_table(table(f"s,,,,{cell},")).rows[0].widths == widths


def test_a_byte_order_mark_windows_line_ends_and_a_lost_last_comma_do_no_harm(tmp_path):
    path = tmp_path / "slices.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f'{COLUMNS}\r\na,2,1,2%,"[3, 4]"\r\n'.encode())
    assert read_table(str(path)).rows == (SliceRow("a", (3, 4), frozenset()),)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('s,,,,"[8 ** 9]",', "line 2: FFN Hidden Dims: '' is not a whole number"),
        ('s,,,,"[__import__(1)]",', "'__import__(1)' is not a whole number"),
        ('s,,,,"[-1]",', "'-1' is not a whole number"),
        ('s,,,,"[1__0]",', "'1__0' is not a whole number"),
        ('s,,,,"[9999999999999]",', "is not a whole number"),
        ('s,,,,"[1.5]",', "'1.5' is not a whole number"),
        ('s,,,,"[1, ]",', "'' is not a whole number"),
        ("s,,,,8192,", "FFN Hidden Dims must be a list in square brackets"),
        ('s,,,,"[1]",20', "Layers Skipped must be a list in square brackets"),
        ('s,,,,"[1]","[2, 2]"', "Layers Skipped names a layer twice"),
        ('s,3,,,"[1]",', "# Layers is 3, but FFN Hidden Dims holds 1 widths"),
        (' ,,,,"[1]",', "line 2: a slice needs a name"),
        ("s,1", "line 2: a line has 6 columns"),
        ('s,,,,"[1]",,', "line 2: a line has 6 columns"),
        ('s,,,,"[1]',  "not readable as CSV"),
        ("", "names no slice"),
        ('s,,,,"[1]",\ns,,,,"[1]",', "names the slice 's' twice"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused_by_its_number_and_column(table, line, said):
    with pytest.raises(LoadError) as caught:
        read_table(table(line))
    assert said in caught.value.message
    assert caught.value.param == "matformer_config_path"


def test_other_columns_no_file_and_no_text_are_refused(table, tmp_path):
    with pytest.raises(LoadError, match="must begin with the columns name,# Layers"):
        read_table(table('s,"[1]"', columns="name,widths"))
    with pytest.raises(LoadError, match="cannot be read"):
        read_table(str(tmp_path / "nowhere.csv"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(LoadError, match="cannot be read"):
        read_table(str(tmp_path / "bytes"))
    (tmp_path / "large").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(LoadError, match="larger than"):
        read_table(str(tmp_path / "large"))


def test_a_default_that_the_table_lacks_is_refused_with_the_names_that_it_has(table):
    path = table('small,,,,"[1]",', 'large,,,,"[2]",')
    with pytest.raises(LoadError, match=r"'tiny' is not in .*; known are 'small', 'large'") as caught:
        read_table(path, "tiny")
    assert caught.value.param == "matformer_slice_name"


def test_a_slice_name_without_a_table_is_refused():
    with pytest.raises(LoadError, match="matformer_slice_name needs matformer_config_path") as caught:
        EngineSpec(path="m", matformer_slice_name="small")
    assert caught.value.param == "matformer_slice_name"
