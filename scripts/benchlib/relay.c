/* A link with delay: relays TCP connections, each byte half a round trip later, each connection at a limited rate.
 *
 * In place of tc's netem, which many kernels are built without. A new connection costs one more round trip before its
 * first byte goes through, as a handshake over such a link would. In C, so that what is measured over it, on the same
 * processors, is not the relay: a thread for each end of each way, and memory that is used again.
 *
 *     relay TARGET_PORT ROUND_TRIP_SECONDS BYTES_PER_SECOND     (prints its own port)
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 128 * 1024, CHUNKS = 64 }; /* 8 MiB on the way: three times what 100 MB/s carry in 25 ms */

struct chunk {
    double due; /* when it may leave */
    ssize_t size; /* 0: the end */
    char data[CHUNK];
};

struct way {
    int source, target;
    double delay, extra; /* seconds; `extra` for the first bytes */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned head, tail; /* chunks received and sent so far */
    struct chunk ring[CHUNKS];
};

struct link {
    struct way there, back;
    pthread_t threads[4];
};

static int target_port;
static double delay, rate;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void sleep_until(double when)
{
    struct timespec t = {.tv_sec = (time_t)when, .tv_nsec = (long)((when - (time_t)when) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

static void *receive(void *argument)
{
    struct way *way = argument;
    ssize_t size;
    do {
        pthread_mutex_lock(&way->lock);
        while (way->head - way->tail == CHUNKS)
            pthread_cond_wait(&way->changed, &way->lock);
        pthread_mutex_unlock(&way->lock);
        struct chunk *chunk = &way->ring[way->head % CHUNKS];
        size = read(way->source, chunk->data, CHUNK);
        chunk->size = size = size < 0 ? 0 : size;
        chunk->due = now() + way->delay + way->extra;
        way->extra = 0;
        pthread_mutex_lock(&way->lock);
        way->head++;
        pthread_cond_signal(&way->changed);
        pthread_mutex_unlock(&way->lock);
    } while (size);
    return NULL;
}

static void *send_on(void *argument)
{
    struct way *way = argument;
    double line_free = 0;
    int broken = 0; /* then it goes on emptying the ring, so that the receiving thread ends */
    for (;;) {
        pthread_mutex_lock(&way->lock);
        while (way->head == way->tail)
            pthread_cond_wait(&way->changed, &way->lock);
        pthread_mutex_unlock(&way->lock);
        struct chunk *chunk = &way->ring[way->tail % CHUNKS];
        if (!chunk->size)
            break;
        double begin = chunk->due > line_free ? chunk->due : line_free;
        if (!broken)
            sleep_until(begin);
        line_free = begin + chunk->size / rate;
        for (ssize_t sent = 0, count; !broken && sent < chunk->size; sent += count) {
            count = send(way->target, chunk->data + sent, chunk->size - sent, MSG_NOSIGNAL);
            if (count < 0) {
                broken = 1;
                shutdown(way->source, SHUT_RDWR); /* nobody wants the rest */
            }
        }
        pthread_mutex_lock(&way->lock);
        way->tail++;
        pthread_cond_signal(&way->changed);
        pthread_mutex_unlock(&way->lock);
    }
    shutdown(way->target, SHUT_WR);
    return NULL;
}

static void open_way(struct way *way, int source, int target, double extra)
{
    way->source = source;
    way->target = target;
    way->delay = delay;
    way->extra = extra;
    pthread_mutex_init(&way->lock, NULL);
    pthread_cond_init(&way->changed, NULL);
}

static void *carry(void *argument)
{
    int client = (int)(long)argument, server = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(target_port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct link *link = calloc(1, sizeof *link);
    if (link && server >= 0 && connect(server, (struct sockaddr *)&address, sizeof address) == 0) {
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        open_way(&link->there, client, server, 2 * delay);
        open_way(&link->back, server, client, 0);
        pthread_create(&link->threads[0], NULL, receive, &link->there);
        pthread_create(&link->threads[1], NULL, send_on, &link->there);
        pthread_create(&link->threads[2], NULL, receive, &link->back);
        pthread_create(&link->threads[3], NULL, send_on, &link->back);
        pthread_join(link->threads[3], NULL); /* all that the server says is with the client, or that has gone */
        shutdown(client, SHUT_RDWR);
        shutdown(server, SHUT_RDWR);
        for (int n = 0; n < 3; n++)
            pthread_join(link->threads[n], NULL);
    }
    free(link);
    close(client);
    close(server);
    return NULL;
}

int main(int count, char **words)
{
    if (count != 4)
        return 2;
    target_port = atoi(words[1]);
    delay = atof(words[2]) / 2;
    rate = atof(words[3]);
    signal(SIGPIPE, SIG_IGN);
    struct sockaddr_in address = {.sin_family = AF_INET};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 64) ||
        getsockname(listener, (struct sockaddr *)&address, &size)) {
        perror("relay");
        return 1;
    }
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int client = accept(listener, NULL, NULL);
        pthread_t thread;
        if (client >= 0 && pthread_create(&thread, NULL, carry, (void *)(long)client) == 0)
            pthread_detach(thread);
    }
}
