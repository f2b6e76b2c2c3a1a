/** A backend that unpins what is mapped: as test/embedded/broken-unpinner.ts, for a real function. */
import { workerData } from "node:worker_threads";
import { EmbeddedBackend } from "../../src/control/embedded-backend.ts";
import { openBlindTable } from "../support/blind-table.ts";

new EmbeddedBackend(workerData, openBlindTable).run();
