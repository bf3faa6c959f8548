import pytest
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_x(cli, publish, family, tmp_path):
    for n in ("base","a","b"): publish(n)
    d = cli("check","acme/a","acme/b","-o","r.yaml"); print(d)
    d = cli("cook","r.yaml","-o","soup"); print(d.code); print(d.out, d.err)
    d = cli("push","soup","acme/soup"); print(d.out,d.err, d.code)
    d = cli("push","soup","acme/soup"); print(d.out,d.err, d.code)
    print((tmp_path/"soup/README.md").read_text())
    assert 0
