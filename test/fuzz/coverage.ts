/** Which code an input reaches: V8's block coverage, read between inputs. A read costs about half a millisecond. */
import { type Profiler, Session } from "node:inspector";

export class Coverage {
  readonly #session = new Session();

  constructor() {
    this.#session.connect();
    this.#post("Profiler.enable");
    this.#post("Profiler.startPreciseCoverage", { callCount: true, detailed: true });
  }

  /** Blocks of src/ that ran since the last call, as `file function offset`. */
  take(): string[] {
    const { result } = this.#post("Profiler.takePreciseCoverage") as Profiler.TakePreciseCoverageReturnType;
    return result.flatMap(({ url, functions }) => {
      const file = /\/src\/(.*)\.ts$/.exec(url)?.[1];
      if (!file) return [];
      return functions.flatMap(({ functionName, ranges }) =>
        ranges.filter((r) => r.count > 0).map((r) => `${file} ${functionName} ${r.startOffset}`),
      );
    });
  }

  close(): void {
    this.#session.disconnect();
  }

  /** The inspector of one's own thread answers at once. */
  #post(method: string, params?: object): object {
    let answer: object = {};
    const post = this.#session.post.bind(this.#session) as (
      method: string,
      params: object | undefined,
      done: (error: Error | null, result: object) => void,
    ) => void;
    post(method, params, (error, result) => {
      if (error) throw new Error(`${method}: ${error.message}`);
      answer = result;
    });
    return answer;
  }
}
