import { Duplex } from "node:stream";
import { gzipSync } from "node:zlib";

/**
 * The guest's end of the line to its agent: collects what is asked, says what the test wants. With `run` it answers by
 * itself: with what that makes of a script, which is "!" for a mark.
 */
export class AgentInGuest extends Duplex {
  readonly asked: { id: string; script: string }[] = [];
  readonly marks: string[] = [];
  readonly #run: ((script: string) => string) | undefined;

  constructor(run?: (script: string) => string) {
    super();
    this.#run = run;
  }

  override _read(): void {}
  override _write(chunk: Buffer, _: string, done: () => void): void {
    for (const [, id, request] of chunk.toString().matchAll(/^(\d+) (\S+)$/gm)) this.#take(id!, request!);
    done();
  }
  #take(id: string, request: string): void {
    const mark = request === "!";
    const script = mark ? request : Buffer.from(request, "base64").toString();
    if (mark) this.marks.push(id);
    else this.asked.push({ id, script });
    if (this.#run) this.answer(id, 0, this.#run(script));
  }

  answer(id: string, code: number, output: string): void {
    this.push(`\n${id} ${code} ${gzipSync(output).toString("base64")}\n`);
  }
}
