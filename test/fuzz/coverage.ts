/**
 * Which code ran: V8's block coverage, read between inputs. A read costs a few milliseconds. It stays on from the first
 * call to the end of the process, because code that is compiled while it is off is counted by whole functions later.
 */
import { type Profiler, Session } from "node:inspector";

let session: Session | undefined;

/** Blocks of src/ that ran since the last call, as `file function offset`. */
export function takeCoverage(): string[] {
  session ??= started();
  const { result } = post(session, "Profiler.takePreciseCoverage") as Profiler.TakePreciseCoverageReturnType;
  return result.flatMap(({ url, functions }) => {
    const file = /\/src\/(.*)\.ts$/.exec(url)?.[1];
    if (!file) return [];
    return functions.flatMap(({ functionName, ranges }) =>
      ranges.filter((r) => r.count > 0).map((r) => `${file} ${functionName} ${r.startOffset}`),
    );
  });
}

function started(): Session {
  const started = new Session();
  started.connect();
  post(started, "Profiler.enable");
  post(started, "Profiler.startPreciseCoverage", { callCount: true, detailed: true });
  return started;
}

/** The inspector of one's own thread answers at once. */
function post(session: Session, method: string, params?: object): object {
  let answer: object = {};
  const send = session.post.bind(session) as (
    method: string,
    params: object | undefined,
    done: (error: Error | null, result: object) => void,
  ) => void;
  send(method, params, (error, result) => {
    if (error) throw new Error(`${method}: ${error.message}`);
    answer = result;
  });
  return answer;
}
