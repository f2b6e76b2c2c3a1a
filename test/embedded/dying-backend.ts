/** A backend whose thread ends when the guest's driver turns PIN on: a CPU waits for its answer. */
import { workerData } from "node:worker_threads";
import { EmbeddedBackend } from "../../src/control/embedded-backend.ts";

new EmbeddedBackend(workerData, () => process.exit(0)).run();
