/** The backend of an embedded guest with an unpinner that is broken on purpose. */
import { workerData } from "node:worker_threads";
import { EmbeddedBackend } from "../../src/control/embedded-backend.ts";
import { openBlindTable } from "../support/blind-table.ts";

new EmbeddedBackend(workerData, openBlindTable).run();
