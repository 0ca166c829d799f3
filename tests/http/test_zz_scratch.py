"""scratch"""
from __future__ import annotations
import httpx, json, io
import pyarrow as pa
from tests.http.conftest import Stack
A="/api/2.0/mlflow/"
async def test_probe(http: httpx.AsyncClient, stack: Stack) -> None:
    out=[]
    async def p(label, method, url, **kw):
        try:
            r = await http.request(method, url, **kw)
            out.append(f"{label}: {r.status_code} {r.text[:200]!r}")
            return r
        except BaseException as e:
            out.append(f"{label}: RAISED {type(e).__name__} {str(e)[:200]}")
    e = (await http.post(A+"experiments/create", json={"name":"probe"})).json()["experiment_id"]
    run = (await http.post(A+"runs/create", json={"experiment_id":e, "start_time": 5})).json()["run"]["info"]["run_id"]
    await p("nul get", "GET", A+"runs/get?run_id=a%00b")
    await p("nul get name", "GET", A+"experiments/get-by-name?experiment_name=a%00b")
    await p("nul model", "GET", A+"registered-models/get?name=a%00b")
    await p("nul alias", "GET", A+"registered-models/alias?name=a&alias=%00")
    await p("nul pipeline", "GET", "/api/v1/pipeline-runs/a%00b")
    await p("nul logs", "GET", "/api/v1/pipeline-runs/a%00b/logs")
    spec={"name":"p","parameters":{"s":{"type":"str","default":"x"},"f":{"type":"float","default":1.0}},"steps":{"a":{"uses":"os:getcwd"}}}
    await p("submit ok","POST","/api/v1/pipeline-runs",json={"spec":spec,"idempotency_key":"k1"})
    await p("submit nul param","POST","/api/v1/pipeline-runs",json={"spec":spec,"params":{"s":"a\0b"},"idempotency_key":"k2"})
    await p("submit nul key","POST","/api/v1/pipeline-runs",json={"spec":spec,"idempotency_key":"k\0"})
    await p("submit nul submitted_by","POST","/api/v1/pipeline-runs",json={"spec":spec,"idempotency_key":"k3","submitted_by":"\0"})
    await p("submit surrogate param","POST","/api/v1/pipeline-runs",content=json.dumps({"spec":spec,"params":{"s":"\ud800"},"idempotency_key":"k4"}))
    await p("submit surrogate key","POST","/api/v1/pipeline-runs",content=json.dumps({"spec":spec,"idempotency_key":"\ud800"}))
    spec2=dict(spec, description="a\0b")
    await p("submit nul in description","POST","/api/v1/pipeline-runs",json={"spec":spec2,"idempotency_key":"k5"})
    r=await p("list","GET","/api/v1/pipeline-runs")
    await p("submit 1e23","POST","/api/v1/pipeline-runs",json={"spec":spec,"params":{"f":1e23},"idempotency_key":"k6"})
    await p("submit 1e23 again","POST","/api/v1/pipeline-runs",json={"spec":spec,"params":{"f":1e23},"idempotency_key":"k6"})
    await p("submit -0.0","POST","/api/v1/pipeline-runs",json={"spec":spec,"params":{"f":-0.0},"idempotency_key":"k7"})
    await p("submit -0.0 again","POST","/api/v1/pipeline-runs",json={"spec":spec,"params":{"f":-0.0},"idempotency_key":"k7"})
    await p("list offset huge","GET","/api/v1/pipeline-runs?offset=99999999999999999999")
    await p("list limit 0","GET","/api/v1/pipeline-runs?limit=0")
    await p("deep spec","POST","/api/v1/pipeline-runs",content=b'{"spec":'+b'{"a":'*50000+b'1'+b'}'*50000+b',"idempotency_key":"z"}',headers={"content-type":"application/json"})
    await p("big spec","POST","/api/v1/pipeline-runs",content=b'{"spec":{"name":"'+b'x'*(40<<20)+b'"},"idempotency_key":"z"}',headers={"content-type":"application/json"})
    await p("deep json","POST",A+"runs/search",content=b'{"x":'+b'['*100000+b']'*100000+b'}')
    await p("deep json known","POST",A+"runs/search",content=b'{"experiment_ids":'+b'['*100000+b']'*100000+b'}')
    await p("surrogate","POST",A+"experiments/create",content=b'{"name":"\\ud800x"}')
    await p("raw nul","POST",A+"experiments/create",content=b'{"name":"a\x00x"}')
    await p("escaped backslash u0000","POST",A+"runs/set-tag",content=json.dumps({"run_id":run,"key":"k","value":"literal \\u0000 text"}))
    await p("token overflow","GET",A+f"metrics/get-history?run_id={run}&metric_key=a&page_token=1:0:0x1p99999")
    await p("token big ts","GET",A+f"metrics/get-history?run_id={run}&metric_key=a&page_token=99999999999999999999:0:0x1p0")
    await p("token nan","GET",A+f"metrics/get-history?run_id={run}&metric_key=a&page_token=9:0:nan")
    async def f(label, flt, **kw):
        await p("filter "+label,"POST",A+"runs/search",json={"experiment_ids":[e],"filter":flt,**kw})
    await f("inf start", "start_time > 1e999")
    await f("-1 start", "start_time > -1")
    await f("inf metric", "metrics.x > 1e999")
    await f("like backslash", "tags.`mlflow.runName` LIKE '%\\'")
    await f("like backslash attr", "run_name LIKE '%\\'")
    await f("neg metric", "metrics.x = -0.0")
    for d in (20,50,80,100,150,200,300,1000,3000):
        await f(f"deep {d}", "NOT (run_name='a' AND "*d+"run_name='a'"+")"*d)
    for d in (100,200,300,1000,4000):
        await f(f"not {d}", "NOT "*d+"run_name='a'")
    for d in (100,1000,5000):
        await f(f"paren {d}", "("*d+"run_name='a'"+")"*d)
    await f("order ''", "", order_by=[""])
    await f("order x2", "", order_by=["metrics.x","metrics.x DESC"])
    await p("exp search none","POST",A+"experiments/search",json={})
    await p("exp ids many","POST",A+"runs/search",json={"experiment_ids":[str(i) for i in range(70000)]})
    await p("model like bs","GET",A+"registered-models/search",params={"filter":"name LIKE '%\\'"})
    await p("create model","POST",A+"registered-models/create",json={"name":"m%"})
    await p("model like bs","GET",A+"registered-models/search",params={"filter":"name LIKE '%\\'"})
    await p("cv file","POST",A+"model-versions/create",json={"name":"m%","source":"file:///etc"})
    await p("cv pct","POST",A+"model-versions/create",json={"name":"m%","source":"s3://b/%252e%252e/x"})
    h={"Idempotency-Key":"same"}
    await p("idem set desc","PATCH",A+"registered-models/update",json={"name":"m%","description":"one"},headers=h)
    await p("idem set desc2","PATCH",A+"registered-models/update",json={"name":"m%","description":"two"},headers=h)
    await p("idem other","POST",A+"model-versions/create",json={"name":"m%","source":"s3://x"},headers=h)
    await p("batch of wrong","POST",A+"runs/log-batch",json={"run_id":run,"metrics":[{"key":"a","value":True,"timestamp":1}]})
    for v in ["1_0"," 1 ","0x10","nan","Inf","-Infinity","1e400",None,[],{}]:
        await p(f"value {v!r}","POST",A+"runs/log-metric",json={"run_id":run,"key":"v","value":v,"timestamp":1})
    await p("value 1e400","POST",A+"runs/log-metric",content=b'{"run_id":"%s","key":"v","value":1e400,"timestamp":1}'%run.encode())
    await p("value int big","POST",A+"runs/log-metric",content=b'{"run_id":"%s","key":"v","value":%s,"timestamp":1}'%(run.encode(),b"9"*400))
    await p("step text","POST",A+"runs/log-metric",json={"run_id":run,"key":"v","value":1,"timestamp":"12","step":"3"})
    await p("step float","POST",A+"runs/log-metric",json={"run_id":run,"key":"v","value":1,"timestamp":12.0,"step":3.0})
    await p("step 1.5","POST",A+"runs/log-metric",json={"run_id":run,"key":"v","value":1,"timestamp":12,"step":3.5})
    await p("step huge","POST",A+"runs/log-metric",json={"run_id":run,"key":"v","value":1,"timestamp":12,"step":2**63})
    await p("ts huge","POST",A+"runs/log-metric",json={"run_id":run,"key":"v","value":1,"timestamp":2**70})
    await p("null tags","POST",A+"runs/create",json={"experiment_id":e,"tags":None})
    await p("null str","POST",A+"runs/log-parameter",json={"run_id":run,"key":"p","value":None})
    await p("array body","POST",A+"runs/create",content=b"[]")
    await p("empty body","POST",A+"experiments/create",content=b"")
    await p("bad utf8","POST",A+"experiments/create",content=b'{"name":"\xff"}')
    P="/api/2.0/mlflow-artifacts/artifacts/"
    await p("put empty","PUT",P+"0/empty",content=b"")
    await p("range empty","GET",P+"0/empty",headers={"Range":"bytes=0-"})
    r=await p("range empty -5","GET",P+"0/empty",headers={"Range":"bytes=-5"})
    await p("range digits","GET",P+"0/empty",headers={"Range":"bytes="+"9"*5000+"-"})
    await p("list none","GET",P[:-1]+"?path=nothing")
    await p("list nul","GET",P[:-1]+"?path=%00")
    await p("get trav","GET",P+"%2e%2e/%2e%2e/etc/passwd")
    await p("get trav2","GET",P+"%252e%252e/x")
    await p("metrics bad","POST","/api/v1/metrics",content=b"xx")
    await p("idem runs create","POST",A+"runs/create",json={"experiment_id":e},headers=h)
    await p("idem runs create other exp","POST",A+"runs/create",json={"experiment_id":"0"},headers=h)
    await p("default content type","POST",A+"experiments/create",content=b'{"name":"nt"}')
    await p("get exp huge","GET",A+"experiments/get?experiment_id=999999999999999999")
    await p("ver huge","GET",A+"model-versions/get?name=x&version=999999999999999999")
    await p("rename param dup", "GET", A+"runs/get?run_id=a&run_id=b")
    for l in out: print(l)
