<?php

declare(strict_types=1);

/*
 * A server for one test: for each connection it reads a request, prints it as a line of JSON, and answers what stands
 * in the list of its argument. `null`: it answers nothing for a while. It prints its port first.
 */

$server = stream_socket_server('tcp://127.0.0.1:0');
echo substr(strrchr(stream_socket_get_name($server, false), ':'), 1), "\n";
foreach (json_decode($argv[1], true) as $answer) {
    $connection = stream_socket_accept($server, 30);
    [$head, $body] = ['', ''];
    while (! str_contains($head, "\r\n\r\n")) {
        $head .= fgets($connection);
    }
    preg_match('/^content-length: (\d+)/mi', $head, $length);
    while (($missing = (int) ($length[1] ?? 0) - strlen($body)) > 0) {
        $body .= fread($connection, $missing);
    }
    echo json_encode([strtok($head, "\r"), $body]), "\n";
    $answer === null ? usleep(1_000_000) : fwrite($connection, $answer);
    fclose($connection);
}
